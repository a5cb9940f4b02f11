"""Ending a process with one sentence and an exit code; several ranks end together, and only one of them speaks."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from spd_calib.errors import SpdError
from spd_calib.ranks import STARTED_BY, is_main_rank, world_size


@contextmanager
def ending_together(debug: bool = False) -> Iterator[None]:
    """Run all that a process does within this: an error becomes one sentence on stderr and an exit code.

    The code is the SpdError's own, and 1 for any other exception. With `debug` the traceback is shown in place of the
    sentence. Of several ranks only the main one prints, and where one fails, all end: the first to fail says why.
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
    """End this rank when torchrun is gone, or the command that started torchrun and gave its id in STARTED_BY.

    Nobody else would end it, and ranks wait for one another.
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
    from .distributed import speak_once  # torch waits until there is something to say

    speak_once(message)
    os._exit(code)  # no clean-up: it would wait for ranks that are gone
