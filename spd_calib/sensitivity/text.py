"""Calibration text: from --data to token sequences to measure on, and others kept for verifying."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.common import TextRef

HUB_DEFAULTS = {  # config and split where --data names none
    "wikitext": ("wikitext-2-raw-v1", "test"),
    "Salesforce/wikitext": ("wikitext-2-raw-v1", "test"),
    "allenai/c4": ("en", "validation"),
}
Tokens = list[int]


@dataclass(frozen=True)
class TextOptions:
    source: str
    seq_len: int
    min_len: int
    max_samples: int
    verify_samples: int
    pack: bool = False
    name: str | None = None  # what stands in files in place of `source`
    skip: int = 0  # sequences at the beginning that are left out: a recovery was fitted on them


@dataclass(frozen=True)
class Text:
    """Sequences of one source. `note` says, in words, where fewer than asked for were found."""

    calibration: list[Tokens]
    verification: list[Tokens]
    note: str | None
    options: TextOptions

    def calibration_ref(self) -> TextRef:
        return _ref(self.options, self.calibration, first=self.options.skip)

    def verification_ref(self) -> TextRef:
        return _ref(self.options, self.verification, first=self.options.skip + len(self.calibration))


def load_text(options: TextOptions, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Tokenize documents in file order until `max_samples + verify_samples` are long enough.

    A document's first `seq_len` tokens, special tokens as the tokenizer adds them, are one sequence; documents
    shorter than `min_len` are left out. The first `max_samples` are for measuring, those that follow for verifying;
    where the text is too short for both, a fifth (at least one) is set aside. Raises InputError for text that
    cannot be used.
    """
    wanted = options.skip + options.max_samples + options.verify_samples
    sequences, documents = _read(options, tokenizer, wanted)
    return split(sequences[options.skip :], documents, options)


def further(text: Text, times: int, tokenizer: PreTrainedTokenizerBase) -> Text | None:
    """The `times`-th further lot of sequences to verify on, as many as those of `text`, behind everything before.

    None where the source holds no whole lot more.
    """
    count = len(text.verification)
    first = text.options.skip + len(text.calibration) + times * count
    found = _read(text.options, tokenizer, first + count)[0][first:]
    return Text([], found, None, replace(text.options, skip=first)) if len(found) == count else None


def _read(options: TextOptions, tokenizer: PreTrainedTokenizerBase, wanted: int) -> tuple[list[Tokens], int]:
    """The first `wanted` sequences, or as many as there are, and the number of documents looked at."""
    sequences: list[Tokens] = []
    held: Tokens = []  # with --pack: tokens that fill no sequence yet
    documents = 0
    for document in read_documents(options.source):
        documents += 1
        sequences += _sequences(document, options, tokenizer, held)
        if len(sequences) >= wanted:
            break
    return sequences[:wanted], documents


def split(sequences: list[Tokens], documents: int, options: TextOptions) -> Text:
    source, note = options.source, None
    if not documents:
        raise InputError(f"{source} holds no text; name a file with documents in it.")
    if len(sequences) < 2:
        raise InputError(
            f"Of {documents} documents in {source}, {len(sequences)} have {options.min_len} tokens or more"
            f"{f' beyond the {options.skip} that were fitted on' if options.skip else ''}, two are "
            "needed (one to measure on, one to verify on); lower --seq-len or --min-len, or glue documents with --pack."
        )
    measured = options.max_samples
    if len(sequences) < options.max_samples + options.verify_samples:
        aside = min(options.verify_samples, max(1, len(sequences) // 5))
        measured = min(options.max_samples, len(sequences) - aside)
        note = (
            f"{source} has {len(sequences)} usable sequences, fewer than {options.max_samples} to measure on and "
            f"{options.verify_samples} to verify on: {measured} are measured on, {len(sequences) - measured} set aside."
        )
    return Text(sequences[:measured], sequences[measured:], note, options)


def _sequences(document: str, options: TextOptions, tokenizer: PreTrainedTokenizerBase, held: Tokens) -> list[Tokens]:
    """The sequences a document completes. With --pack, `held` carries tokens on to the next document."""
    n = options.seq_len
    if not options.pack:
        ids = tokenizer(document, truncation=True, max_length=n)["input_ids"]
        return [ids] if len(ids) >= options.min_len else []
    held += tokenizer(document)["input_ids"]
    done = len(held) // n
    sequences = [held[i * n : (i + 1) * n] for i in range(done)]
    del held[: done * n]
    return sequences


def read_documents(source: str) -> Iterator[str]:
    """Documents of a .jsonl (key `text`), .txt (blank lines between them), .parquet (column `text`) or hub dataset."""
    path = Path(source).expanduser()
    readers = {".jsonl": _jsonl, ".txt": _txt, ".parquet": _parquet}
    if path.suffix in readers or path.exists():
        if not path.is_file():
            raise InputError(f"There is no data file {source}; name a .jsonl, .txt or .parquet, or a hub dataset.")
        if path.suffix not in readers:
            raise InputError(f"{source} is no .jsonl, .txt or .parquet file; convert it, or rename it if it is one.")
        return readers[path.suffix](path)
    return _hub(source)


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as f:
            yield from f
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text: it holds bytes that are no UTF-8.") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise InputError(f'{path}, line {number}, is not of the form {{"text": "..."}}; write one document a line.')
        yield text


def _txt(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip()
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip()


def _parquet(path: Path) -> Iterator[str]:
    import pandas

    try:
        texts = pandas.read_parquet(path, columns=["text"])["text"]
    except Exception:  # pyarrow has many ways to say so
        raise InputError(f"{path} is not a parquet file with a column `text`.") from None
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{path}, row {number}: the column `text` holds no text.")
        yield text


def _hub(source: str) -> Iterator[str]:
    """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT, streamed: nothing but what is used is fetched."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are not the user's concern, the outcome is
    name, _, rest = source.partition(":")
    config, _, part = rest.partition(":")
    default_config, default_part = HUB_DEFAULTS.get(name, (None, "train"))
    try:
        rows = datasets.load_dataset(name, config or default_config, split=part or default_part, streaming=True)
        for row in rows:
            if row["text"].strip():
                yield row["text"]
    except (KeyError, AttributeError):
        raise InputError(f"The dataset {source} has no column `text`; write your text to a .jsonl instead.") from None
    except Exception as e:
        raise InputError(
            f"{source!r} is no local file, and as a hub dataset it cannot be read ({type(e).__name__}); name a .jsonl, "
            ".txt or .parquet file, or NAME:CONFIG:SPLIT with a network."
        ) from None


def _ref(options: TextOptions, sequences: list[Tokens], first: int) -> TextRef:
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(json.dumps(ids).encode())
    return TextRef(
        source=options.name or options.source,
        seq_len=options.seq_len,
        min_len=options.min_len,
        pack=options.pack,
        first=first,
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        sha256=digest.hexdigest(),
    )
