"""Where a recovery leaves what it has so far, so that a killed one goes on: one safetensors file a step."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.files import unwritable
from spd_calib.ranks import is_main_rank


class Journal:
    """A folder of finished blocks, and of the training that was under way. `run` names what it belongs to.

    It appears with the first thing saved, and one process at a time may have it.
    """

    def __init__(self, folder: Path, run: dict):
        self.folder = folder
        self.run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        self._file: int | None = None
        try:
            if folder.exists():
                self._take()
        except OSError as e:
            raise InputError(f"{folder} cannot be used to keep the state in: {e.strerror}.") from None

    def save(self, name: str, tensors: dict[str, Tensor], note: dict) -> None:
        """Raises SpdError where the disk refuses."""
        path = self.folder / f"{name}.safetensors"
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

    def _take(self) -> None:
        """Lock the folder, and write down the run that it is of, unless a run that was killed has done so."""
        self._file = os.open(self.folder / "run", os.O_RDWR | os.O_CREAT, 0o666)
        if is_main_rank():
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Another process keeps its state in {self.folder}; wait for it, or choose another -o."
                ) from None
        found = os.pread(self._file, 100, 0)
        if not self.run.encode().startswith(found):  # killed while it wrote this, it has saved nothing else
            raise InputError(
                f"{self.folder} holds the state of another recovery (plan, text or options differ); remove it first."
            )
        if is_main_rank() and found != self.run.encode():
            os.pwrite(self._file, self.run.encode(), 0)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict] | None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["note"])  # noqa: SIM118
        except (OSError, SafetensorError):
            raise InputError(f"{path} is not whole; remove {self.folder} and begin again.") from None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None
