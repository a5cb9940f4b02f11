"""Which of torchrun's ranks is this process? What every command asks, before anything heavy is imported."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from spd_calib.errors import SpdError

STARTED_BY = "SPD_CALIB_STARTED_BY"  # in the environment of ranks: the id of the process that runs torchrun for them


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_rank() -> bool:
    """The one rank that writes files and prints."""
    return rank() == 0


@contextmanager
def ending_together(debug: bool = False) -> Iterator[None]:
    """Around all that a process does. An SpdError becomes its one sentence and exit code, unless `debug`.

    Of several ranks only the main one prints, and where one fails, all end: the first to fail says why, once.
    """
    if not is_main_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if world_size() > 1 and "TORCHELASTIC_RUN_ID" in os.environ:  # which torchrun sets
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except SpdError as e:
        if debug and world_size() == 1:
            raise
        _leave(traceback.format_exc() if debug else f"spd-calib: {e}", e.exit_code)
    except SystemExit as e:  # all ranks come to it alike, and torchrun ends them with the first: let the main one speak
        if e.code and not is_main_rank():
            time.sleep(5)
        raise
    except Exception as e:  # nobody foresaw it
        if debug and world_size() == 1:
            raise
        what = f"spd-calib: unexpected {type(e).__name__}: {str(e).strip() or 'no message'}"
        _leave(traceback.format_exc() if debug else f"{what}; --debug shows where, please report it.", 1)


def _end_with(torchrun: int) -> None:
    """End this rank when the process that started it is gone: nobody else would, and ranks wait for one another.

    Or when the command is that started torchrun by itself, and says so in STARTED_BY.
    """
    while os.getppid() == torchrun and _alive(os.environ.get(STARTED_BY)):
        time.sleep(0.5)
    if is_main_rank():
        with suppress(OSError):  # nobody may be left to read it
            print("spd-calib: torchrun is gone, and its ranks end; start it again.", file=sys.__stderr__, flush=True)
    os._exit(1)


def _alive(process: str | None) -> bool:
    try:
        os.kill(int(process or os.getpid()), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _leave(message: str, code: int) -> NoReturn:
    if world_size() == 1:
        print(message, file=sys.stderr)
        raise SystemExit(code)
    from spd_calib.parallel.distributed import speak_once

    speak_once(message)
    os._exit(code)  # no clean-up: it would wait for ranks that are gone
