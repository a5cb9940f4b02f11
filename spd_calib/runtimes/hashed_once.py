"""Hashing a checkpoint once, not once a process: a server of a 70B has several that would read 140 GB each."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from spd_calib.formats.files import write_text

JUST_WRITTEN = 2.0  # seconds within which a file may change again and keep its time


def hashed_once(folder: Path, fingerprint: Callable[[], str]) -> str:
    """Return what `fingerprint` gives for the files in `folder`, without calling it where it is known.

    It is known where it was given before to this user, by this version, for the very same files: their identity, size
    and times are the same. Processes that ask at once wait for the first. Where nothing can be written, it is called.
    """
    files = _files(folder)
    key = hashlib.sha256(json.dumps([version("spd-calib"), files]).encode()).hexdigest()
    known = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "spd-calib", "fingerprints", key)
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        lock = open(known.with_suffix(".lock"), "w")  # noqa: SIM115  closed below
    except OSError:
        return fingerprint()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if known.is_file() and len(text := known.read_text().strip()) == hashlib.sha256().digest_size * 2:
            return text
        found = fingerprint()
        newest = max((changed for *_, changed in files), default=0)
        if _files(folder) == files and newest < time.time_ns() - JUST_WRITTEN * 1e9:
            write_text(known, found + "\n")
        return found


def _files(folder: Path) -> list[tuple[str, int, int, int, int, int]]:
    """Return name, device, inode, size, time of content and time of change of every file that a model is read from."""
    found = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        stat = path.stat()  # of what a link leads to
        found.append((path.name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found
