"""The weight files of a checkpoint on disk, and every tensor in them by name, dtype, shape and file.

Nothing here knows a model, and nothing reads a weight: the headers of the files say it all.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spd_calib.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint's files; `dtype` as safetensors spells it, such as F32 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


def safetensors_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint, in the order of their names.

    Raises InputError where there are none, only pickles, some are missing, or others lie beside them that another
    loader would take: a single file beside an index of others, parts that no index names.
    """
    index = read_index(folder)
    names = sorted(set(index.values())) if index is not None else [SINGLE]
    if index is None and not (folder / SINGLE).is_file():
        raise InputError(_no_weights(folder))
    missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
    if missing:
        raise InputError(f"{folder} lacks the weight file {missing[0]} its index names; fetch the model again.")
    if others := sorted(p.name for p in folder.glob("model*.safetensors") if p.name not in names):
        taken = f"the files that {INDEX} names" if index is not None else SINGLE
        raise InputError(
            f"{folder} holds {others[0]} beside {taken}, and which of them is the model depends on who loads it; "
            "remove the one that is out of date."
        )
    return [folder / n for n in names]


def _no_weights(folder: Path) -> str:
    """Return the sentence for a folder without a weight file that can be read."""
    if parts := sorted(folder.glob("model*.safetensors")):
        return f"{folder} holds {parts[0].name}, but no {INDEX} that names its parts; fetch the model again."
    if pickles := sorted(folder.glob("*.bin")):
        return (
            f"{folder} holds its weights as a pickle ({pickles[0].name}), which may run code when read; "
            "convert it to safetensors first."
        )
    return f"{folder} holds no weights in safetensors; name a checkpoint that does (pickles are not read)."


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the index of a checkpoint in several files, tensor to file name; None where there is no index.

    Raises InputError where it cannot be read as one.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        index = None
    if not isinstance(index, dict) or not index or not all(map(_plain, [*index, *index.values()])):
        raise InputError(f"{path} cannot be read as an index of weight files; fetch the model again.")
    return index


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint's files by its name, read from their headers.

    Raises InputError where a file is not whole, two files hold a tensor of one name, or the index says otherwise.
    """
    index = read_index(folder)
    found: dict[str, StoredTensor] = {}
    for path in safetensors_files(folder):
        for tensor in _header(path):
            if tensor.name in found:
                raise InputError(
                    f"{folder} holds {tensor.name} twice, in {found[tensor.name].file.name} and in {path.name}; "
                    "fetch the model again."
                )
            found[tensor.name] = tensor
    if index is not None:
        _check_index(folder, index, found=found)
    return found


def _header(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one file, in the order of their names."""
    try:
        with open(path, "rb") as beginning:  # before the whole file is mapped for a header that cannot be one
            if int.from_bytes(beginning.read(8), "little") > min(path.stat().st_size - 8, MAX_HEADER_BYTES):
                raise OSError("header beyond the end of the file, or larger than the format allows")
        with safe_open(path, framework="pt") as f:
            for name in sorted(f.keys()):
                if not _plain(name):
                    raise InputError(f"{path} holds a tensor of the name {name!r}, which no model has; fetch it again.")
                view = f.get_slice(name)
                yield StoredTensor(name, str(view.get_dtype()), tuple(view.get_shape()), path)
    except (SafetensorError, OSError):
        raise InputError(f"{path} is not a whole safetensors file, it may be cut off; fetch the model again.") from None


@contextmanager
def opened(paths: Collection[Path]) -> Iterator[dict[Path, Any]]:
    """Open weight files while this lasts: what is read of a file that stays open counts as this process's memory.

    Raises InputError for one that has gone.
    """
    path = None
    try:
        with ExitStack() as stack:
            files = {}
            for path in paths:
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            yield files
    except (SafetensorError, OSError):
        raise InputError(f"{path} cannot be read any more; fetch the model again.") from None


def _plain(name: object) -> bool:
    """Tell whether `name` is text that can stand in a sentence."""
    return isinstance(name, str) and name != "" and name.isprintable()


def _check_index(folder: Path, index: dict[str, str], *, found: dict[str, StoredTensor]) -> None:
    """Raise InputError unless the index names every tensor, each in the file that holds it."""
    lost = [n for n, file in index.items() if n not in found or found[n].file.name != file]
    if lost:
        raise InputError(
            f"The index of {folder} says that {index[lost[0]]} holds {lost[0]}{_and_more(len(lost) - 1)}, which it "
            "does not; fetch the model again."
        )
    if unnamed := [t for n, t in found.items() if n not in index]:
        raise InputError(
            f"The index of {folder} does not name {unnamed[0].name}{_and_more(len(unnamed) - 1)}, which "
            f"{unnamed[0].file.name} holds; fetch the model again."
        )


def _and_more(count: int) -> str:
    return f" and {count} tensors more" if count > 1 else " and one tensor more" if count else ""
