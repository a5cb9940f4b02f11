"""Where a recovery leaves what it has so far, so that a killed one goes on: one safetensors file a step."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_calib.errors import InputError


class Journal:
    """A folder of finished blocks, and of the training that was under way. `run` names what it belongs to."""

    def __init__(self, folder: Path, run: dict):
        self.folder = folder
        self.run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        try:
            if folder.exists() and (folder / "run").read_text() != self.run:
                raise InputError(
                    f"{folder} holds the state of another recovery (plan, text or options differ); remove it first."
                )
        except OSError as e:
            raise InputError(f"{folder} cannot be used to keep the state in: {e.strerror}.") from None

    def save(self, name: str, tensors: dict[str, Tensor], note: dict) -> None:
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run").write_text(self.run)
            save_file(tensors, temporary, metadata={"note": json.dumps(note)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path} cannot be written ({e}); make room and run the same command again.") from None

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
