"""Documents out of files as people have them: compressed, in folders, with other columns, as chats; and refused."""

import bz2
import gzip
import json
import lzma
import os
import socket
import sys
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from spd_calib.errors import InputError
from spd_calib.sensitivity.documents import read_documents

TEXTS = ["one two\nthree", "2024-01-01", "NA", "12", 'with "quotes", commas\n\nand ü', "two thousand\u2028x"]
LINES = "".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()
CASES = Path(__file__).parent.parent.parent / "shared" / "cases"


def contents(path, column: str = "text") -> list:
    return [document.content for document in read_documents(str(path), column)]


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def sentence(path, column: str = "text") -> str:
    with pytest.raises(InputError) as e:
        contents(path, column)
    said = str(e.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 400, said
    return said


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".GZ", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["t.jsonl", "T.JSONL", "t.json", "t.ndjson"])
def test_json_lines_by_any_name_compressed_or_with_a_byte_order_mark(tmp_path, name, mark, suffix, pack):
    assert contents(written(tmp_path, name + suffix, pack(mark + LINES))) == TEXTS


@pytest.mark.parametrize(
    ("name", "content"), [("t.jsonl", LINES), ("t.json", LINES), ("t.txt", b"one\r\n\r\ntwo\rthree")]
)
def test_a_plain_file_needs_no_datasets(tmp_path, monkeypatch, name, content):
    """Its import takes a third of a second and more, which a profile would pay before it measures anything."""
    with_datasets = contents(written(tmp_path, f"{name}.gz", gzip.compress(content)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert contents(written(tmp_path, name, content)) == with_datasets


def test_a_json_array_of_objects_or_of_strings(tmp_path):
    rows = [{"text": t, "n": i if i else "first"} for i, t in enumerate(TEXTS)]
    assert contents(written(tmp_path, "t.json", json.dumps(rows, indent=2).encode())) == TEXTS
    assert contents(written(tmp_path, "s.json", b"\xef\xbb\xbf\n" + json.dumps(TEXTS).encode())) == TEXTS
    assert contents(written(tmp_path, "e.json", b"[]")) == []


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.TSV", "\t"), ("t.csv.gz", ",")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_keep_every_cell_a_text(tmp_path, name, separator, encoding):
    pandas.DataFrame({"n": range(len(TEXTS)), "text": TEXTS, "more": "x"}).to_csv(
        tmp_path / name, sep=separator, index=False, encoding=encoding
    )
    assert contents(tmp_path / name) == TEXTS
    assert contents(tmp_path / name, "n") == [str(i) for i in range(len(TEXTS))]


def test_parquet_of_any_kind_of_string(tmp_path):
    kinds = {"a": pa.string(), "b": pa.large_string()}
    for name, kind in kinds.items():
        parquet.write_table(
            pa.table({"text": pa.array(TEXTS, kind), "n": [1] * len(TEXTS)}), tmp_path / f"{name}.parquet"
        )
        assert contents(tmp_path / f"{name}.parquet") == TEXTS
    parquet.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), tmp_path / "c.parquet")
    assert contents(tmp_path / "c.parquet") == TEXTS


def test_paragraphs_of_a_txt(tmp_path):
    text = "\n \none two\nthree  \n\n\nfour\r\n  \r\nfive"
    for name, content in [("t.txt", text.encode()), ("t.txt.gz", gzip.compress(b"\xef\xbb\xbf" + text.encode()))]:
        path = written(tmp_path, name, content)
        assert contents(path) == ["one two\nthree", "four", "five"]
        assert [d.place for d in read_documents(str(path))] == [f"{path}, line {n}" for n in (3, 7, 9)]


def test_another_column_by_name(tmp_path):
    path = written(tmp_path, "t.jsonl", b'{"body": "a", "text": "b"}\n{"body": "c", "text": "d"}\n')
    assert (contents(path, "body"), contents(path)) == (["a", "c"], ["b", "d"])
    pandas.DataFrame({"body": ["a"], "text": ["b"]}).to_parquet(tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet", "body") == ["a"]


def test_chats_are_lists_of_messages(tmp_path):
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "c"}],
    ]
    path = written(tmp_path, "t.jsonl", "".join(json.dumps({"messages": c}) + "\n" for c in chats).encode())
    assert contents(path) == contents(path, "messages") == chats
    parquet.write_table(pa.table({"messages": chats}), tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet") == chats
    both = written(tmp_path, "both.jsonl", json.dumps({"messages": chats[0], "text": "t"}).encode())
    assert (contents(both), contents(both, "messages")) == (["t"], [chats[0]])


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    written(tmp_path, "b.jsonl", b'{"text": "b"}\n')
    written(tmp_path, "a.txt", b"a1\n\na2\n")
    written(tmp_path, "README.md", b"no text of it")
    written(tmp_path / "sub", "c.csv", b"text\nc\n")
    written(tmp_path / ".cache", "d.txt", b"hidden")
    assert contents(tmp_path) == ["a1", "a2", "b", "c"]
    (tmp_path / "empty").mkdir()
    assert "holds no .jsonl" in sentence(tmp_path / "empty")


def test_names_that_mean_something_to_a_shell(tmp_path):
    for name in ("a[1].jsonl", "a*b.txt", "{x},?.csv"):
        content = {"jsonl": b'{"text": "x"}', "txt": b"x", "csv": b"text\nx\n"}[name.rpartition(".")[2]]
        assert contents(written(tmp_path, name, content)) == ["x"]


def test_a_large_file_is_not_read_whole(tmp_path):
    """What follows far behind the documents that are taken may even be broken."""
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    path = written(tmp_path, "t.jsonl", line * 3000 + b"\xff\xfe\n")
    documents = read_documents(str(path))
    assert [len(next(documents).content) for _ in range(500)] == [10000] * 500
    assert "no UTF-8" in sentence(path)


def test_nothing_is_asked_of_a_network_and_nothing_left_at_home(tmp_path, monkeypatch):
    home, asked = tmp_path / "home", []
    home.mkdir()
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    pandas.DataFrame({"text": ["x"]}).to_parquet(tmp_path / "t.parquet")
    paths = [written(tmp_path, n, b"text\nx") for n in ("t.txt", "t.csv")] + [tmp_path / "t.parquet"]
    assert [contents(p)[-1] for p in paths] == ["text\nx", "x", "x"]
    assert not asked and not [f for _, _, files in os.walk(home) for f in files]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "line 3"),
        ("b.jsonl", b'{"text": "a"}\n{"text": "half \\ud83d of it"}\n', "line 2: 'text' holds half a surrogate pair"),
        ("c.jsonl", b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "line 1: 'messages' holds half"),
        ("d.jsonl", b'{"text": null}', "line 1: 'text' holds neither"),
        ("e.jsonl", b'{"messages": []}', "line 1: 'messages' holds neither"),
        ("f.jsonl", b"[" * 100000, "line 1"),
        ("g.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2, is not valid JSON"),
        ("h.json", b'[{"text": "a"}, 3]', "entry 2"),
        ("h2.json", b"[" * 100000, "not valid JSON"),
        ("i.json", b'{\n "data": [{"text": "a"}]\n}', "line 1"),
        ("j.csv", b"id,body\n1,a\n", "no column 'text'; name another as `column`"),
        ("k.csv", b"text\nHello, world, and all\n", "rows with more fields than columns"),
        ("l.csv", b"text,n\na,1\nb,c,2\n", "line 3"),
        ("m.csv", b"text\ncaf\xe9\n", "no UTF-8"),
        ("n.txt.gz", b"not compressed", "cannot be read as .txt"),
        ("o.jsonl.gz", gzip.compress(LINES, mtime=0)[:40], "cannot be read as .jsonl"),
        ("p.jsonl.zst", b"\x28\xb5\x2f\xfd1234", "cannot be read as .jsonl"),
        ("q.parquet", b"PAR1 no", "cannot be read as .parquet"),
        ("r.parquet.gz", b"", "cannot be read as .parquet"),
        ("s.docx", b"x", "is no .jsonl"),
        ("t.txt", "ü".encode("utf-16"), "no UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    said = sentence(written(tmp_path, name, content))
    assert words in said and name in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/t.JSONL.gz", "no data file"),
        ("x" * 5000, "cannot be looked for: File name too long"),
        ("~nobody-of-this-name/t.txt", "cannot be looked for"),
        ("/dev/null", "no data file"),
    ],
)
def test_names_of_no_file(name, words):
    assert words in sentence(name)


def test_a_parquet_says_which_columns_it_has(tmp_path):
    pandas.DataFrame({"body": ["a"], "n": [1]}).to_parquet(tmp_path / "t.parquet")
    assert "no column 'text'; name another as `column`: body, n" in sentence(tmp_path / "t.parquet")
    assert "row 1: 'n' holds neither" in sentence(tmp_path / "t.parquet", "n")


@pytest.mark.skipif(not CASES.exists(), reason="../shared is not here")
def test_the_shared_cases():
    assert len(contents(CASES / "byte_order_mark.jsonl")) == 60
    assert "lone_surrogate.jsonl, line 2" in sentence(CASES / "lone_surrogate.jsonl")
