"""From --data to sequences: what is read, left out, glued, set aside, and refused."""

import json

import pytest
import tiny

from spd_calib.errors import InputError
from spd_calib.sensitivity.text import TextOptions, further, load_text

WORDS = list(tiny.WORDS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def doc(n: int, start: int = 0) -> str:
    """A document of n words; with the BOS the tokenizer adds, n + 1 tokens."""
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(n))


def options(path, seq_len=8, min_len=8, max_samples=3, verify_samples=2, pack=False) -> TextOptions:
    return TextOptions(str(path), seq_len, min_len, max_samples, verify_samples, pack)


def test_first_tokens_of_long_enough_documents_in_file_order(tmp_path, tokenizer):
    texts = [doc(20), doc(3), doc(7, 5), doc(6, 9), doc(9, 11), doc(30, 13), doc(8, 17), doc(8, 19)]
    path = tiny.write_jsonl(tmp_path / "t.jsonl", texts)
    text = load_text(options(path), tokenizer)
    expected = [tokenizer(t)["input_ids"][:8] for t in texts if len(t.split()) >= 7]
    assert text.calibration == expected[:3] and text.verification == expected[3:5]
    assert expected[0][0] == tokenizer.bos_token_id
    assert text.note is None
    assert text.verification_ref().first == 3 and text.calibration_ref().tokens == 24


def test_min_len_lets_shorter_documents_in(tmp_path, tokenizer):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [doc(3), doc(1), doc(20)])
    text = load_text(options(path, min_len=4), tokenizer)
    assert [len(s) for s in text.calibration + text.verification] == [4, 8]


def test_where_the_text_is_short_a_fifth_is_set_aside_and_said(tmp_path, tokenizer):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [doc(9, i) for i in range(20)])
    text = load_text(options(path, max_samples=128, verify_samples=64), tokenizer)
    assert (len(text.calibration), len(text.verification)) == (16, 4)
    assert text.note is not None and "16 are measured on, 4 set aside" in text.note
    text = load_text(options(path, max_samples=18, verify_samples=64), tokenizer)
    assert (len(text.calibration), len(text.verification)) == (16, 4)
    text = load_text(options(path, max_samples=12, verify_samples=8), tokenizer)
    assert (len(text.calibration), len(text.verification), text.note) == (12, 8, None)


def test_the_sequences_of_a_profile_are_found_again(tmp_path, tokenizer):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [doc(9, i) for i in range(7)])
    text = load_text(options(path, max_samples=128, verify_samples=64), tokenizer)
    again = load_text(
        options(path, max_samples=len(text.calibration), verify_samples=len(text.verification)), tokenizer
    )
    assert again.calibration_ref() == text.calibration_ref() and again.verification_ref() == text.verification_ref()


@pytest.mark.parametrize("pack", [False, True])
def test_further_lots_to_verify_on_follow_each_other(tmp_path, tokenizer, pack):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [doc(7, i) for i in range(10)])  # 8 tokens each, with the BOS
    everything = load_text(options(path, max_samples=8, verify_samples=2, pack=pack), tokenizer)
    text = load_text(options(path, pack=pack), tokenizer)
    one, two = (further([text], times, tokenizer=tokenizer)[0] for times in (1, 2))
    assert (
        one.verification == everything.calibration[5:7]
        and two.verification == everything.calibration[7:8] + everything.verification[:1]
    )
    assert (one.verification_ref().first, two.verification_ref().first) == (5, 7)
    assert further([text], 3, tokenizer=tokenizer) is None  # one sequence is left
    assert one.note is None and one.calibration == []


def test_packing_glues_documents_and_loses_nothing_between_them(tmp_path, tokenizer):
    texts = [doc(3), doc(11, 4), doc(2), doc(13, 9)]
    path = tiny.write_jsonl(tmp_path / "t.jsonl", texts)
    text = load_text(options(path, pack=True), tokenizer)
    sequences, bos = text.calibration + text.verification, tokenizer.bos_token_id
    assert {(len(s), s[0]) for s in sequences} == {(8, bos)}
    found = [i for s in sequences for i in s if i != bos]
    stream = [i for t in texts for i in tokenizer(t)["input_ids"] if i != bos]
    assert found == stream[: len(found)] and len(stream) - len(found) < 8


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl", b"", "holds no text"),
        ("b.jsonl", b"\n \n", "holds no text"),
        ("c.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("d.jsonl", b"not json\n", "line 1"),
        ("e.jsonl", b'{"text": 3}\n', "line 1"),
        ("f.jsonl", b'["text"]\n', "line 1"),
        ("g.txt", b"\xff\xfe\x00\x81", "UTF-8"),
        ("h.parquet", b"PAR1 no", "parquet"),
        ("i.bin", b"x", "no .jsonl"),
        ("j.jsonl", json.dumps({"text": "a in on"}).encode(), "0 have 8 tokens"),
        ("k.jsonl", (json.dumps({"text": doc(9)}) + "\n").encode(), "1 have 8 tokens"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, tokenizer, name, content, word):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=word) as e:
        load_text(options(path), tokenizer)
    assert name in str(e.value)


def test_a_missing_file_is_no_hub_dataset(tokenizer):
    with pytest.raises(InputError, match="no data file"):
        load_text(options("nowhere.jsonl"), tokenizer)


def test_packed_sequences_are_taken_evenly_from_more_of_the_text(tmp_path):
    """Of 4 times as many as are used, as far as there are; what is verified on follows all of them."""
    path = tmp_path / "text.jsonl"
    texts = tiny.stories(60, tiny.WORDS, seed=3)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = tiny.tokenizer()
    everything = load_text(TextOptions(str(path), 8, 8, 10**6, 1, pack=True), tokenizer)
    sequences = everything.calibration + everything.verification
    found = load_text(TextOptions(str(path), 8, 8, 10, 5, pack=True, spread=4), tokenizer)
    assert found.calibration == sequences[0:40:4] and found.verification == sequences[40:45]
    assert found.verification_ref().first == 40
    (more,) = further([found], 2, tokenizer=tokenizer)
    assert more.verification == sequences[50:55] and more.verification_ref().first == 50
    usable = len(sequences) - 5
    most = load_text(TextOptions(str(path), 8, 8, usable - 3, 5, pack=True, spread=4), tokenizer)
    assert len(most.calibration) == usable - 3 and most.verification == sequences[-5:]
    assert most.calibration[0] == sequences[0] and most.calibration[-1] in sequences[-8:-5]
