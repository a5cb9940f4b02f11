"""Finished measurements beside the profile they are for, so that a killed run goes on where it stopped.

One JSON line a measurement, on disk before the next one begins; the first line says which run they are of. Floats are
written as Python prints them, which is exact, so a run that was resumed gives the same bits as one that was not.
(A recovery keeps tensors instead: recovery/journal.py.) Where no journal is kept, None stands for it.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from spd_calib.errors import InputError
from spd_calib.formats.files import unwritable
from spd_calib.formats.locks import open_locked
from spd_calib.parallel.distributed import from_main_rank
from spd_calib.ranks import is_main_rank

Key = Sequence[int | str]


class MeasurementJournal:
    """Keeps what `run` (JSON values by name) has measured so far. The file appears with the first measurement.

    Of many ranks the main one reads and writes; all know what was finished when the run began. Used as a context it is
    closed at the end. Raises InputError for a journal of another run, one that another process is writing, and one
    that cannot be read or written.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path, self.run = path, json.loads(json.dumps(run))
        self._file: int | None = None
        text = from_main_rank(self._open() if is_main_rank() else None)
        self._finished: dict[str, Any] = {}
        self._whole = self._read(text or "")

    @property
    def finished(self) -> int:
        """Return the number of measurements that were finished when the run began."""
        return len(self._finished)

    def once(self, key: Key, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the value that stands under `key`; where there is none, what `measured` returns, kept from now on."""
        name = json.dumps(list(key))
        if name in self._finished:
            return self._finished[name]
        value = measured()
        if is_main_rank() and _finite(value):  # what is not finite will be refused, and need not be remembered
            self._append({"key": list(key), "value": value})
        return value

    def of_text(self, number: int) -> "JournalOfText":
        """Return the part of the journal that is about one of several texts."""
        return JournalOfText(self, number)

    def remove(self) -> None:
        """Remove the file: the run is done."""
        if is_main_rank():
            self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Let go of the file, which stays: the end of a process does the same."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> str:
        """Return the file's text, "" where there is none yet; holds the file from here on."""
        if not self.path.exists():
            return ""
        try:
            self._file = open_locked(self.path)
            return self.path.read_bytes().decode("utf-8", errors="replace")
        except OSError as e:
            raise InputError(f"The journal {self.path} cannot be read: {e.strerror}; delete it.") from None

    def _read(self, text: str) -> int:
        """Take in the lines that are whole, and return their length in bytes. What a kill cut off is dropped."""
        if text and "\n" not in text and not (json.dumps(self.run) + "\n").startswith(text):
            raise self._not_ours("which is no journal of this tool, or one of another run")
        length = 0
        for line in text.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                if length == 0 and line.endswith("\n"):
                    raise self._not_ours("which is no journal of this tool")
                break
            if length == 0:
                self._check_same_run(entry)
            elif "key" in entry and "value" in entry:
                self._finished[json.dumps(entry["key"])] = entry["value"]
            length += len(line.encode())
        return length

    def _check_same_run(self, found: dict) -> None:
        names = [*self.run, *(name for name in found if name not in self.run)]
        differing = next((name for name in names if found.get(name) != self.run.get(name)), None)
        if differing is not None:
            raise self._not_ours(f"the journal of another run, whose {differing} differs")

    def _not_ours(self, what: str) -> InputError:
        return InputError(
            f"Beside the output lies {self.path}, {what}; delete it to begin anew, or choose another output."
        )

    def _append(self, entry: dict) -> None:
        try:
            if self._file is None:
                self._file = open_locked(self.path)
            lines = [entry] if self._whole else [self.run, entry]
            os.ftruncate(self._file, self._whole)
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            if os.pwrite(self._file, text, self._whole) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
            self._whole += len(text)
        except OSError as e:
            raise unwritable(self.path, e) from None


@dataclass(frozen=True)
class JournalOfText:
    """A journal's measurements on one of several texts."""

    journal: MeasurementJournal
    number: int

    def once(self, key: Key, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what MeasurementJournal.once does, under a key of this text's own."""
        return self.journal.once(["text", self.number, *key], measured)


Journal = MeasurementJournal | JournalOfText


def once(journal: Journal | None, key: Key, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the journal's `once` does; without a journal, what `measured` returns."""
    return measured() if journal is None else journal.once(key, measured)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)
