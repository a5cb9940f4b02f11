"""From what a caller gives (a file or a document, a model's name or the object itself) to what the core works on.

A checkpoint that `recover` wrote has a part of its own: recovered.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spd_calib.demo.assets import model_dir
from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.recovery import REPORT_FILE
from spd_calib.models.in_memory import UNNAMED
from spd_calib.parallel.session import Session, open_session, session_in_memory

from .options import RunOptions, whole_number

Model = str | Path | PreTrainedModel
"""A hub id, a folder, 'demo' for the one this package ships, or a transformers model in memory."""
MAX_NAME = 255  # bytes of a file's or a folder's name, on any file system that is in use
D = TypeVar("D", bound=BaseModel)


def document_of(kind: type[D], given: D | Path | str) -> tuple[D, Path | None]:
    """Return the document given, and the path of its file, where a file was given. Raises InputError as files.read."""
    if isinstance(given, kind):
        return given, None
    if not isinstance(given, str | Path):
        name = kind.__name__.lower()
        raise InputError(f"A {type(given).__name__} is no {name}; give a {name}, or the path of its file.")
    path = Path(given)
    return read(kind, path), path


def open_model(
    model: Model,
    *,
    tp: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    expected: ModelRef | None = None,
    replicas: bool = False,
) -> Session:
    """Return `model`, opened for `tp` ranks; its weights are read by the session's `load`.

    A model in memory needs its `tokenizer`; the object stays as it is. `expected` is the reference that a document
    holds: raises InputError where the model is another one, and as parallel.session.open_session does. With `replicas`
    the processes that torchrun started are no ranks: each simulates them all.
    """
    tp = whole_number("tp", tp, least=1)
    if not isinstance(model, str | Path):
        return session_in_memory(model, tokenizer, tp=tp, expected=expected)
    name = str(model)
    found = open_session(place_of(name), tp, expected=expected, replicas=replicas)
    session = replace(found, ref=found.ref.model_copy(update={"id": name}))
    return session if tokenizer is None else replace(session, tokenizer=tokenizer)


def open_model_of(
    document: Profile | Plan,
    *,
    path: Path | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    replicas: bool = False,
) -> Session:
    """Return the model that a profile or a plan is of, opened for as many ranks as the document says.

    `path` is the document's file: a folder that it names is looked for from there, too. `model` says where the model
    is in place of the document. Raises InputError where it is not the one that the document is of.
    """
    return open_model(
        model if model is not None else place_of_own(document, path),
        tp=document.tensor_parallel.size,
        tokenizer=tokenizer,
        expected=document.model,
        replicas=replicas,
    )


def place_of_own(document: Profile | Plan, path: Path | None) -> str:
    """Return where the model of a document in the file `path` lies; a recovered one's folder may be renamed since."""
    place = named_by(document.model, path)
    if path is not None and not Path(place).expanduser().is_dir() and path.with_name(REPORT_FILE).is_file():
        return str(path.absolute().parent)
    return place


def named_by(ref: ModelRef, path: Path | None) -> str:
    """Return where the model of a reference lies, which stands in the file `path`; see `place_of`."""
    if ref.id == UNNAMED:
        raise InputError("The model was in memory and has no name to find it by; give it as `model`.")
    return place_of(ref.id, path)


def place_of(name: str, path: Path | None = None) -> str:
    """Return the folder or the hub id that `name` stands for, as it is given by a user or in the file `path`.

    'demo' is the model this package ships. A relative folder is looked for from the working directory, then from the
    file's folder and from the one above it (a checkpoint's plan lies in the checkpoint); what is in none of them is
    returned as it stands: a hub id.
    """
    if any(len(part.encode()) > MAX_NAME for part in Path(name).parts):
        raise InputError(f"{name[:32]!r}... is too long for the name of a folder or a hub id; name a model.")
    if name == "demo":
        return str(model_dir())
    if path is not None and not Path(name).expanduser().is_dir():
        folder = path.absolute().parent
        for place in (folder / name, folder.parent / name):
            if (place / "config.json").is_file():
                return str(place)
    return name


def resolved_for(session: Session, run: RunOptions, *, dtype: str = "float32") -> RunOptions:
    """Return the options with a device and a dtype that say what they are, as `session.load` takes them.

    Where they were left out, a model in memory runs where and as it is, any other in `dtype` and on a GPU if there is
    one. Raises InputError for a dtype that is not known.
    """
    model: Any = session.model
    if model is None:
        return run.resolved(dtype)
    if run.stream:
        raise InputError("A model in memory cannot be read from disk block by block; leave `stream` out.")
    own = str(model.dtype).removeprefix("torch.")
    return replace(run, device=str(model.device) if run.device == "auto" else run.device).resolved(own)
