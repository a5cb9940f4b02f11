"""Documents of a text the user names: a file, a folder of files, or a dataset of the Hugging Face hub."""

import glob
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from spd_calib.errors import InputError

TEXT, MESSAGES = "text", "messages"  # the columns that are read where the user names none
FORMATS = ".jsonl, .json, .txt, .csv, .tsv or .parquet"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # what `datasets` unpacks while it reads
HUB_DEFAULTS = {  # config and split where the user names none
    "wikitext": ("wikitext-2-raw-v1", "train"),  # perplexity is published on its test split
    "Salesforce/wikitext": ("wikitext-2-raw-v1", "train"),
    "allenai/c4": ("en", "validation"),
}
BYTE_ORDER_MARK = "\ufeff"

Message = dict[str, Any]


class Document(NamedTuple):
    """One document: its text, or the messages of a chat; `place` is where it stands, for error messages."""

    content: str | list[Message]
    place: str


def read_documents(source: str, column: str = TEXT) -> Iterator[Document]:
    """Yield the documents of `source` in order, reading no further than the caller goes.

    `source` is a file in one of FORMATS (upper or lower case; all but .parquet also compressed, as in .jsonl.gz), a
    folder (every such file in it and below, sorted by path, hidden ones left out), or a dataset of the hub as NAME,
    NAME:CONFIG or NAME:CONFIG:SPLIT. `column` names the column or JSON key that holds a document; where it is "text"
    and there is none, "messages" is read. A document is a string, or a list of chat messages. Raises InputError,
    naming the file and where possible the line, for what cannot be read.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder(path, column)
        if path.is_file():
            return _file(path, column)
        is_local = path.exists() or _suffix(path) in READERS
    except (OSError, RuntimeError) as e:  # a name too long, a folder that may not be entered, ~nobody
        raise InputError(f"{source[:80]!r} cannot be looked for: {getattr(e, 'strerror', None) or e}.") from None
    if is_local:
        raise InputError(f"There is no data file {source}; name a {FORMATS} file, a folder of them, or a hub dataset.")
    return _hub(source, column)


def _suffix(path: Path) -> str:
    """Return the suffix that says the format, in lower case: '.jsonl' of a.JSONL.gz."""
    *_, before, last = ["", "", *(s.lower() for s in path.suffixes)]
    return before if last in COMPRESSED else last


def _folder(folder: Path, column: str) -> Iterator[Document]:
    paths = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = sorted(p for p in paths if _suffix(p) in READERS and p.is_file())
    if not files:
        raise InputError(f"The folder {folder} holds no {FORMATS} file; name a folder with text in it.")
    return chain.from_iterable(_file(path, column) for path in files)


def _file(path: Path, column: str) -> Iterator[Document]:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise InputError(f"{path} is no {FORMATS} file; convert it, or rename it if it is one.")
    try:
        yield from reader(path, column)
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text: it holds bytes that are no UTF-8; save it as UTF-8.") from None
    except Exception as e:  # pyarrow, pandas and the unpackers have many ways to say so
        why = (isinstance(e, OSError) and e.strerror) or (str(e) or type(e).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{path} cannot be read as {_suffix(path)}: {why}.") from None


def _rows(read: Callable[..., Any], path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as `datasets` reads it, piece by piece."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said by us, once
    with TemporaryDirectory() as cache, _without_shared_memory():  # it puts a lock there; else into the user's home
        rows = read(glob.escape(str(path.absolute())), streaming=True, cache_dir=cache, **options)
    yield from rows


@contextmanager
def _without_shared_memory() -> Iterator[None]:
    """Keep `datasets` from sharing a counter with torch's data loaders: there are none, and the memory may be full."""
    import datasets

    before = datasets.config.TORCH_AVAILABLE
    datasets.config.TORCH_AVAILABLE = False
    try:
        yield
    finally:
        datasets.config.TORCH_AVAILABLE = before


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, each with its line break."""
    for number, line in enumerate(_unpacked(path) if path.suffix.lower() in COMPRESSED else _plain(path)):
        yield line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line


def _plain(path: Path) -> Iterator[str]:
    """Yield the lines of a file that is not compressed, without the import of `datasets`, slower than most files."""
    with open(path, encoding="utf-8") as f:
        yield from f


def _unpacked(path: Path) -> Iterator[str]:
    """Yield the lines of a compressed file."""
    import datasets

    for row in _rows(datasets.Dataset.from_text, path, keep_linebreaks=True):
        yield row["text"]


def _paragraphs(path: Path, column: str) -> Iterator[Document]:
    """Yield what stands between blank lines. A .txt has no columns."""
    first, paragraph = 1, list[str]()
    for number, line in enumerate(chain(_lines(path), [""]), 1):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Document("".join(paragraph).strip(), f"{path}, line {first}")
            paragraph = []


def _json_lines(path: Path, column: str) -> Iterator[Document]:
    """Yield the documents of JSON Lines.

    Not by the JSON reader of `datasets`: it turns strings that look like dates into dates, drops half a surrogate pair,
    and does not know at which line it failed.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _of_json(_loads(line), column=column, place=f"{path}, line {number}")


def _json(path: Path, column: str) -> Iterator[Document]:
    """Yield the documents of one JSON array, read whole, or of JSON Lines under this name."""
    if not next((line for line in _lines(path) if line.strip()), "").lstrip().startswith("["):
        yield from _json_lines(path, column)
        return
    try:
        entries = json.loads("".join(_lines(path)))
    except (ValueError, RecursionError) as e:
        where = f", line {e.lineno}," if isinstance(e, json.JSONDecodeError) else ""
        raise InputError(f"{path}{where} is not valid JSON; write an array of documents, or one a line.") from None
    for number, entry in enumerate(entries, 1):
        row = {column: entry} if isinstance(entry, str) else entry
        yield _of_json(row, column=column, place=f"{path}, entry {number}")


def _loads(line: str) -> Any:
    """Return the value of a line of JSON; None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _of_json(row: Any, *, column: str, place: str) -> Document:
    """Return the document in a JSON object. Raises InputError for anything else."""
    if not isinstance(row, dict) or (name := _column(row, column)) is None:
        raise InputError(
            f'{place}, is not of the form {{"{column}": "..."}}; write one document a line, or name its key with '
            "`column`."
        )
    return _document(row[name], column=name, place=place)


def _csv(path: Path, column: str, *, separator: str) -> Iterator[Document]:
    import pandas

    rows = _csv_rows(path, column, separator)
    for number in count(1):
        with warnings.catch_warnings():
            # of a row with more fields than columns pandas would drop some: text with commas in it, not in quotes
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            row = next(rows, None)
        if row is None:
            return
        yield _document(row[column], column=column, place=f"{path}, row {number}")


def _csv_rows(path: Path, column: str, separator: str) -> Iterator[dict[str, Any]]:
    import datasets
    import pandas

    features = datasets.Features({column: datasets.Value("string")})  # else 'NA' is no text, and '12' a number
    options = {"sep": separator, "features": features, "keep_default_na": False, "index_col": False}
    try:
        yield from _rows(datasets.Dataset.from_csv, path, **options)
    except KeyError:
        raise InputError(f"{path} has no column {column!r}; name another as `column`.") from None
    except pandas.errors.EmptyDataError:
        return
    except pandas.errors.ParserWarning:
        raise InputError(
            f"{path} has rows with more fields than columns; put text that holds a {separator!r} into quotes."
        ) from None


def _parquet(path: Path, column: str) -> Iterator[Document]:
    import datasets
    from pyarrow import parquet

    columns = parquet.read_schema(path).names
    if (name := _column(columns, column)) is None:
        raise InputError(f"{path} has no column {column!r}; name another as `column`: {', '.join(columns)}.")
    for number, row in enumerate(_rows(datasets.Dataset.from_parquet, path, columns=[name]), 1):
        yield _document(row[name], column=name, place=f"{path}, row {number}")


def _hub(source: str, column: str) -> Iterator[Document]:
    """Yield the rows of a dataset of the hub, streamed: nothing but what is used is fetched."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are not the user's concern, the outcome is
    name, _, rest = source.partition(":")
    config, _, part = rest.partition(":")
    default_config, default_part = HUB_DEFAULTS.get(name, (None, "train"))
    try:
        rows = datasets.load_dataset(name, config or default_config, split=part or default_part, streaming=True)
        for number, row in enumerate(rows, 1):
            if (found := _column(row, column)) is None:
                raise InputError(
                    f"The dataset {source} has no column {column!r}; name another as `column`: {', '.join(row)}."
                )
            document = _document(row[found], column=found, place=f"{source}, row {number}")
            if not isinstance(document.content, str) or document.content.strip():
                yield document
    except InputError:
        raise
    except Exception as e:
        raise InputError(
            f"{source!r} is no local file, and as a hub dataset it cannot be read ({type(e).__name__}); name a "
            f"{FORMATS} file, or NAME:CONFIG:SPLIT with a network."
        ) from None


def _column(columns: Any, column: str) -> str | None:
    """Return which of `columns` holds the documents: `column`, or the messages of a chat; None where neither does."""
    if column in columns:
        return column
    return MESSAGES if column == TEXT and MESSAGES in columns else None


def _document(value: Any, *, column: str, place: str) -> Document:
    """Return a document whose content is `value`. Raises InputError where that is neither text nor a chat."""
    if not isinstance(value, str) and not _is_chat(value):
        raise InputError(f"{place}: {column!r} holds neither text nor a list of chat messages.")
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: {column!r} holds half a surrogate pair, such as \\ud83d alone, which is no character; "
            "take it out."
        ) from None
    return Document(value, place)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".txt": _paragraphs,
    ".csv": partial(_csv, separator=","),
    ".tsv": partial(_csv, separator="\t"),
    ".parquet": _parquet,
}
