"""Starting torchrun on this machine: loopback only, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from spd_calib.errors import InputError, SpdError
from spd_calib.ranks import STARTED_BY, world_size

RANK = "spd_calib.runtimes.torchrun.rank"
FROM_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def torchrun(ranks: int, module: str, *, arguments: Sequence[str], timeout: float = 3600) -> None:
    """Run `python -m module arguments` on that many ranks and wait for their end.

    Raises the SpdError or InputError of the rank that failed, and InputError where this process is a rank itself.
    """
    if world_size() > 1:
        raise InputError("This command starts torchrun itself; run it without.")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", RANK, module, *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in FROM_TORCHRUN and not k.startswith("TORCHELASTIC")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment[STARTED_BY] = str(os.getpid())
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stderr = process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        raise SpdError(f"The {ranks} ranks were not done after {timeout:.0f} s and have been ended.") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun and its ranks, a session of their own
            process.wait()
    if process.returncode:
        said = [line.removeprefix("spd-calib: ") for line in stderr.splitlines() if line.startswith("spd-calib: ")]
        signals = [line.partition("traceback : ")[2] for line in stderr.splitlines() if "traceback : Signal" in line]
        if said and re.search(r"exitcode\s*: 2\b", stderr):  # in torchrun's account of the rank that failed first
            raise InputError(said[0])
        raise SpdError(said[0] if said else f"A rank under torchrun failed: {(signals or ['it said nothing'])[0]}.")
