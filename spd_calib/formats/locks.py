"""One process at a time: files that are kept open, and locked, as long as somebody writes them."""

import fcntl
import os
from pathlib import Path

from spd_calib.errors import InputError


def open_locked(path: Path, written: Path | None = None) -> int:
    """Open a file for reading and writing, make it where it is missing, and lock it; return its descriptor.

    The lock ends with os.close, or with the process. Raises InputError, naming what is `written` (by default the file
    itself), where the file is locked already, and OSError as os.open does.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise InputError(
            f"Another process is writing {written or path}; wait for it, or choose another output."
        ) from None
    except OSError:
        os.close(file)
        raise
    return file
