"""A command in a process of its own, disturbed: forked, so that many tries are cheap."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SENTENCE = "spd-calib: "


@dataclass
class End:
    """How a process ended: its exit code (or minus its signal), its stderr, seconds, and operations on files seen."""

    code: int
    err: str
    seconds: float
    operations: int


def run(
    arguments: list[str], out: Path, log: Path, at: int | None = None, number: int = 0, after: float | None = None,
    since: Path | None = None, file_size: int | None = None,
) -> End:  # fmt: skip
    """`spd-calib ARGUMENTS` in a forked process, which gets signal `number` before its `at`-th operation in `out`, or
    `after` seconds, from its start or from when the file `since` is there; `file_size` limits the files it writes."""
    start = time.monotonic()
    counted = log.with_suffix(".operations")
    err, said = os.pipe()  # no file: that would be limited, too
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid == 0:
        _child(arguments, out, said, counted, at, number, file_size)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.close(said)
    if after is not None:
        _send(number, pid, after, since)
    with open(err, errors="replace") as f:
        log.write_text(f.read())
    status = os.waitpid(pid, 0)[1]
    seconds = time.monotonic() - start
    operations = len(counted.read_bytes()) if counted.exists() else 0
    return End(os.waitstatus_to_exitcode(status), log.read_text(), seconds, operations)


def _send(number: int, pid: int, after: float, since: Path | None) -> None:
    begun = time.monotonic() if since is None else None
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if begun is None and since is not None and since.exists():
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun >= after:
            os.kill(pid, number)
            return
        time.sleep(0.001)


def _child(
    arguments: list[str], out: Path, said: int, counted: Path, at: int | None, number: int, file_size: int | None
) -> None:
    """Run the command in the forked process, its stderr into `said`. Does not return."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = str(out.parent)  # where a bench puts what its ranks read: they are found by it
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if file_size is None:
            _watch(str(out), counted, at, number)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        sys.argv = ["spd-calib", *arguments]
        from spd_calib.cli.main import main

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except KeyboardInterrupt:  # before or behind all that main does
        os.write(2, f"{SENTENCE}interrupted.".encode())
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.stderr.flush()
        os._exit(code)


def _watch(out: str, counted: Path, at: int | None, number: int) -> None:
    """Count what this process does to files below `out`, and send it the signal before the `at`-th."""
    tally = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in events and args and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(out):
            seen += 1
            os.write(tally, b".")
            if seen == at:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


@contextmanager
def small_disk(out: Path, room: int) -> Iterator[None]:
    """Make `out` a tmpfs while this lasts. Raises OSError where none can be mounted."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", out], capture_output=True)
    if done.returncode:
        raise OSError(done.stderr.decode())
    try:
        yield
    finally:
        subprocess.run(["umount", out], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 2**16):
                return True
        except OSError:
            return False


def processes_naming(word: str) -> list[int]:
    """Return the processes with `word` in their command line, but for this one (forked ones have this one's line)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def imports() -> None:
    """Import everything heavy once, before the forks."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import lm_eval.tasks
    import matplotlib.pyplot
    import torch
    import transformers

    from spd_calib.cli import main
    from spd_calib.evaluation import harness
    from spd_calib.recovery import checkpoint, recover
    from spd_calib.sensitivity import fisher, profile

    torch.set_num_threads(1)
    del lm_eval, matplotlib, transformers, main, harness, checkpoint, recover, fisher, profile
