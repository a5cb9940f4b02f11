"""The text that a model is measured on, and the text kept for verifying."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spd_calib.demo.assets import data_file
from spd_calib.errors import InputError
from spd_calib.formats.profile import Profile
from spd_calib.parallel.session import Session
from spd_calib.planning.whole_plans import Round
from spd_calib.sensitivity.averaging import joint_ref
from spd_calib.sensitivity.documents import TEXT
from spd_calib.sensitivity.text import Fitted, Text, TextOptions, further, load_texts

from .options import check_whole_numbers

DEFAULT_SEQ_LEN = 2048
NOTHING_FITTED: Fitted = {}


@dataclass(frozen=True)
class TextSelection:
    """Names the sequences of a text that are used.

    seq_len: tokens of a document, at most (default: 2048, or the model's limit); min_len: documents with fewer are
    left out (default: seq_len). The first `max_samples` sequences are measured on, the `verify_samples` after them are
    kept for verifying. With `pack` documents are glued together and cut every seq_len tokens. `column` names the field
    that holds a document, where there are several: a text, or chat messages for the tokenizer's chat template.
    """

    seq_len: int | None = None
    min_len: int | None = None
    max_samples: int = 128
    verify_samples: int = 64
    pack: bool = False
    column: str = TEXT


def load_texts_for(
    session: Session,
    data: Sequence[str],
    selection: TextSelection,
    *,
    fitted: Fitted = NOTHING_FITTED,
    spread: int = 1,
) -> list[Text]:
    """Return the sequences of each text of `data` for a session's model, none in two of them.

    `fitted` and `spread` (for text that is packed) are those of TextOptions.

    Raises InputError for lengths that the model cannot read, for a text that is named twice or cannot be used, and for
    none.
    """
    seq_len, min_len = selection.seq_len, selection.min_len
    check_whole_numbers(1, max_samples=selection.max_samples, verify_samples=selection.verify_samples)
    check_whole_numbers(2, seq_len=seq_len, min_len=min_len)
    if not data:
        raise InputError("`data` names no text; give one, such as a file.")
    if len(set(data)) < len(data):
        raise InputError("`data` names one text twice; name each once.")
    if seq_len is not None and seq_len > session.max_length:
        raise InputError(f"seq_len {seq_len} is beyond the model's {session.max_length} tokens; lower it.")
    seq_len = seq_len or min(DEFAULT_SEQ_LEN, session.max_length)
    if min_len is not None and min_len > seq_len:
        raise InputError(f"min_len {min_len} is more than seq_len {seq_len}: no document would be left.")
    samples = selection.max_samples, selection.verify_samples
    common = TextOptions(
        "",
        seq_len,
        min_len or seq_len,
        *samples,
        pack=selection.pack,
        fitted=fitted,
        column=selection.column,
        spread=spread if selection.pack else 1,
    )
    return load_texts([replace(common, source=resolve_data(d), name=d) for d in data], session.tokenizer)


def reload_texts(
    session: Session, profile: Profile, *, path: Path | None = None, fitted: Fitted = NOTHING_FITTED
) -> list[Text]:
    """Return the very sequences that a profile speaks of, text by text; `path` is the profile's file.

    `fitted` is that of TextOptions.

    Raises InputError where a text or the tokenizer has changed since.
    """
    refs = list(zip(profile.text.each, profile.verify_text.each, strict=True))
    options = [
        TextOptions(
            resolve_data(measured.source, path),
            measured.seq_len,
            measured.min_len,
            measured.sequences,
            kept.sequences,
            measured.pack,
            name=measured.source,
            column=measured.column,
            fitted=fitted,
        )
        for measured, kept in refs
    ]
    texts = load_texts(options, session.tokenizer)
    for text, (measured, kept) in zip(texts, refs, strict=True):
        if (text.calibration_ref().sha256, text.verification_ref().sha256) != (measured.sha256, kept.sha256):
            raise InputError(
                f"{measured.source} or the tokenizer has changed since the profile was made; profile again."
            )
    return texts


def verification_rounds(session: Session, texts: Sequence[Text]) -> Iterator[Round]:
    """Yield the sequences kept for verifying, then further ones behind them, as many each time, of every text.

    Ends where one of the texts is at its end.
    """
    found: list[Text] | None = list(texts)
    times = 0
    while found is not None:
        yield Round([t.verification for t in found], joint_ref([t.verification_ref() for t in found]))
        times += 1
        found = further(texts, times, tokenizer=session.tokenizer)


def resolve_data(data: str, path: Path | None = None) -> str:
    """Return the file or the hub data set that `data` names, as it is given by a user or in the file `path`.

    'demo' is the calibration text this package ships. A relative file is looked for from the working directory, then
    from the folder of `path`.
    """
    if data == "demo":
        return str(data_file("calibration"))
    if path is not None and not Path(data).expanduser().exists() and (beside := path.parent / data).exists():
        return str(beside)
    return data
