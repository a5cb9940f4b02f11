"""Looking after vLLM's processes: the environment they read, the errors they log, the files they leave behind."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def vllm_environment(tp: int, **more: str) -> Iterator[None]:
    """Make the settings that vLLM reads from the environment, and `more`, where the user has not, until the end."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // tp)
    bound = [",".join(str(cores[(rank * share + i) % len(cores)]) for i in range(share)) for rank in range(tp)]
    wanted = {
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_INT4_W4A8": "0",  # else 4-bit weights meet 8-bit activations on CPUs with AMX, which was not measured
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(bound),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with environment({**wanted, **more}):
        yield


@contextmanager
def environment(wanted: dict[str, str]) -> Iterator[None]:
    """Set environment variables where the user has not; taken back afterwards."""
    added = {k: v for k, v in wanted.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def remove_shared_memory(names: set[str]) -> None:
    """Remove an engine's shared memory files, which vLLM leaves behind when its processes are ended."""
    for folder in (Path("/dev/shm"), Path("/tmp")):
        for path in folder.glob("vllm_dist_*"):
            if any(name and path.name.startswith(name) for name in names):
                path.unlink(missing_ok=True)


@contextmanager
def errors_in_a_file() -> Iterator[Path]:
    """Have all processes of vLLM write their errors into a file as well, whose path this gives; it begins empty.

    Only where the user has not configured vLLM's log; else the file stays empty.
    """
    folder = _folder()
    log, configuration = folder / "errors.log", folder / "logging.json"
    log.write_text("")
    stream = os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    handlers = {
        "stream": {"class": "logging.StreamHandler", "level": "ERROR", "stream": stream},
        "file": {"class": "logging.FileHandler", "level": "ERROR", "filename": str(log)},
    }
    loggers = {"vllm": {"handlers": list(handlers), "level": "INFO", "propagate": False}}
    document = {"version": 1, "disable_existing_loggers": False, "handlers": handlers, "loggers": loggers}
    configuration.write_text(json.dumps(document))
    with environment({"VLLM_LOGGING_CONFIG_PATH": str(configuration)}):
        yield log


@functools.cache
def _folder() -> Path:
    """Return the folder of this process's log: vLLM opens the file once, and an engine may be started after another."""
    folder = tempfile.mkdtemp(prefix="spd-calib-vllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def root_cause(log: Path) -> str:
    """Return the last line of the first traceback in a file of errors, which the later ones follow from, or ''."""
    raised = False
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("Traceback (most recent call last)"):
            raised = True
        elif raised and line and not line[0].isspace():
            return line.split(": ", 1)[-1].strip().rstrip(".")
    return ""
