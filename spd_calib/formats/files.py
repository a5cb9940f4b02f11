"""Reading and writing the travelling files: whole or not at all, and never half accepted."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from spd_calib.errors import InputError, SpdError
from spd_calib.ranks import is_main_rank

from .hardware import Hardware
from .pareto import Pareto
from .plan import Plan
from .profile import Profile
from .recovery import Recovery
from .results import Results

FORMATS: dict[str, type[BaseModel]] = {
    "profile": Profile,
    "plan": Plan,
    "results": Results,
    "hardware": Hardware,
    "pareto": Pareto,
    "recovery": Recovery,
}
# what a file of each kind that is written begins with, white space left out
OPENINGS = {name: f'{{"format":"spd-calib/{name}"'.encode() for name in FORMATS} | {
    "page": b"<!DOCTYPEhtml>",
    "figure": b"\x89PNG",
    "log of documents": b'{"task":',
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_BYTES = 64 * 2**20  # no profile comes near this; it keeps a wrong file from filling the memory
F = TypeVar("F", bound=BaseModel)


def read(kind: type[F], path: Path) -> F:
    """Return the document in a file. Raises InputError naming the file and what is wrong with it."""
    name = kind.__name__.lower()
    data = _load(path, name)
    expected = f"spd-calib/{name}"
    if not isinstance(data, dict) or data.get("format") != expected:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path} is not a {name} file: its format is {found!r}, not {expected!r}.")
    if data.get("version") != 1 or data["version"] is True:  # True == 1
        raise InputError(
            f"{path} has version {data.get('version')!r}; this spd-calib reads version 1: update spd-calib."
        )
    try:
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])).encode("unicode_escape").decode() or "the whole"  # one line
        raise InputError(f"{path} is not a valid {name}: {where}: {first['msg']}.") from None


def name_of(path: Path, names: Sequence[str]) -> str:
    """Return which of the formats `names` a file is of: 'profile', say. Raises InputError for any other."""
    data = _load(path, " or ".join(names))
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    for name in names:
        if found == f"spd-calib/{name}":
            return name
    raise InputError(f"{path} is not a {' or '.join(names)} file: its format is {found!r}.")


def _load(path: Path, name: str) -> Any:
    """Return the JSON in a file that should be a `name`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB: it is no {name} file.")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_each_once, path))
    except FileNotFoundError:
        raise InputError(f"There is no file {path}; `spd-calib {_writer(name)}` writes one.") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is not valid JSON, it may be cut off; write it again with `spd-calib {_writer(name)}`."
        ) from None


def _each_once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON file. Raises InputError for a key that is there twice: readers take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise InputError(f"{path} holds {twice!r} twice in one object; write it again.")
    return found


def _writer(name: str) -> str:
    return {"results": "eval", "hardware": "bench", "pareto": "plan --pareto", "recovery": "recover"}.get(name, name)


def dumps(document: BaseModel) -> str:
    """Return a document as it is written to disk: indented JSON, keys in the model's order, a newline at the end."""
    return json.dumps(document.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then moved into place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as write_text does; of many ranks one writes.

    Raises SpdError where the disk is full, InputError where the folder is missing or cannot be written to.
    """
    if not is_main_rank():
        return
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as e:
        raise unwritable(path, e) from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def unwritable(path: Path, error: Exception) -> SpdError:
    """Return what to raise where `error` keeps `path` from being written: a full disk is no fault of the input."""
    why = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
    words = map(os.strerror, FULL)  # all that safetensors gives
    if getattr(error, "errno", None) in FULL or any(w in str(error) for w in words):
        return SpdError(f"{path} cannot be written: {why}; make room and run the same command again.")
    return InputError(f"{path} cannot be written: {why}; choose another output.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(outputs: Mapping[str, Path | None]) -> None:
    """Fail before the work, not after it; `outputs` are the files to be written, if any, by their kind in OPENINGS.

    Raises InputError where one could not be written, would take the place of a file of another kind, or of another
    output.
    """
    kinds = dict[Path, str]()
    for kind, path in outputs.items():
        if path is None:
            continue
        _check_folder(path)
        if (other := kinds.setdefault(path.resolve(), kind)) != kind:
            raise InputError(f"{path} is to be both the {other} and the {kind}; name two files.")
        if path.is_file() and not _opens_as(path, OPENINGS[kind]):
            raise InputError(f"{path} is there and is no {kind}, it would be lost; name another output.")


def _opens_as(path: Path, opening: bytes) -> bool:
    """Say whether a file is empty or opens with these bytes, white space aside."""
    try:
        with open(path, "rb") as f:
            found = b"".join(f.read(4096).split())
    except OSError as e:
        raise unwritable(path, e) from None
    return not found or found.startswith(opening)


def _check_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file.")
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} for the output does not exist; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"The folder {path.parent} cannot be written to; choose another output.")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with open(path, "rb") as f:  # piece by piece: it may be larger than memory
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_as_written(document: BaseModel) -> str:
    """Return the sha256 of the file that `dumps` would fill, for a document that lies in none."""
    return hashlib.sha256(dumps(document).encode()).hexdigest()


def schema(name: str) -> str:
    """Return the JSON Schema of a format, by its name, as it is kept in docs/schemas/."""
    return json.dumps(FORMATS[name].model_json_schema(), indent=1) + "\n"
