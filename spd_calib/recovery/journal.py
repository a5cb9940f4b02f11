"""The state of a recovery on disk, so that a killed one goes on where it stopped: safetensors files, one for each step.

(Measurements go to a file of JSON lines instead: sensitivity/journal.py.) Where no journal is kept, None stands for it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.files import unwritable
from spd_calib.formats.locks import open_locked
from spd_calib.ranks import is_main_rank

LAYOUT = 2  # of what the steps hold: another version's state is that of another run


class TensorJournal:
    """A folder of finished steps, and of the training that was under way. `run` (JSON values) names what it belongs to.

    It appears with the first thing saved, and one process at a time may have it. Of many processes under torchrun the
    main one locks it. Used as a context it is closed at the end. Raises InputError for a folder of another run, one
    that another process is writing, and one that cannot be read or written.
    """

    def __init__(self, folder: Path, run: dict):
        self.folder = folder
        self.run = hashlib.sha256(json.dumps(run | {"layout": LAYOUT}, sort_keys=True).encode()).hexdigest()
        self._file: int | None = None
        try:
            if folder.exists():
                self._take()
        except OSError as e:
            raise InputError(f"{folder} cannot be used to keep the state in: {e.strerror}.") from None

    def save(self, name: str, tensors: dict[str, Tensor], *, note: dict) -> None:
        """Keep the tensors and the note (JSON values) of a step. Raises SpdError where the disk refuses."""
        path = self._path(name)
        temporary = path.with_suffix(".part")
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take()
            save_file(tensors, temporary, metadata={"note": json.dumps(note)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as e:
            temporary.unlink(missing_ok=True)
            raise unwritable(path, e) from None

    def load(self, name: str) -> tuple[dict[str, Tensor], dict] | None:
        """Return the tensors and the note of a step; None where it is not finished."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["note"])  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):  # also without a note
            raise InputError(f"{path} is not whole; remove {self.folder} and begin again.") from None

    def forget(self, name: str) -> None:
        """Remove what is kept of a step, if anything is."""
        self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the folder, which stays: the end of a process does the same."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _take(self) -> None:
        """Lock the folder, and write down the run that it is of, unless a run that was killed has done so."""
        path = self.folder / "run"
        if is_main_rank():
            self._file = open_locked(path, written=self.folder)
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        found = os.pread(self._file, 100, 0)
        whole = found == self.run.encode()
        # killed while it wrote this, it has saved nothing else
        if not self.run.encode().startswith(found) or (not whole and any(self.folder.glob("*.safetensors"))):
            self.close()
            raise InputError(
                f"{self.folder} holds the state of another recovery (plan, text or options differ); remove it first."
            )
        if is_main_rank() and found != self.run.encode():
            os.pwrite(self._file, self.run.encode(), 0)
