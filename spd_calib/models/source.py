"""The place of a model's files, and the name by which its user knows it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A model's folder; `id` is what the user named, `revision` the commit where the hub has it from."""

    id: str
    folder: Path
    revision: str | None
