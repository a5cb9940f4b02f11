"""Where a model's files lie, and by what name its user knows it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A model's folder; `id` is what the user named, `revision` the commit where the hub has it from."""

    id: str
    folder: Path
    revision: str | None
