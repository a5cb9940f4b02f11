"""Held-out text is held out: what was there before is left out, of one text and of several, and when read again."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.sensitivity.text import TextOptions, further, load_text, load_texts

WORDS = list(tiny.WORDS)
N = 8  # tokens a sequence, the BOS among them


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def doc(seed: int, words: int = N - 1) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def options(path: Path, measured: int = 4, kept: int = 3, pack: bool = False, **more) -> TextOptions:
    return TextOptions(str(path), N, N, measured, kept, pack, **more)


def write(path: Path, seeds, words: int = N - 1) -> Path:
    return tiny.write_jsonl(path, [doc(seed, words) for seed in seeds])


def ids(tokenizer, seeds) -> list:
    return [tokenizer(doc(seed))["input_ids"] for seed in seeds]


def test_what_repeats_is_left_out_and_said(tmp_path, tokenizer):
    path = write(tmp_path / "t.jsonl", [0, 1, 0, 2, 3, 1, 4, 3, 4, 5, 6, 7])
    text = load_text(options(path), tokenizer)
    assert (text.calibration, text.verification) == (ids(tokenizer, range(4)), ids(tokenizer, [4, 5, 6]))
    assert text.note is not None and "4 sequences are left out" in text.note and "fewer" not in text.note
    assert text.verification_ref().first == 4


def test_documents_that_differ_behind_what_is_used_are_the_same_sequence(tmp_path, tokenizer):
    texts = [doc(0), doc(0) + " ball", doc(1), doc(0) + " box", doc(2)]
    text = load_text(options(tiny.write_jsonl(tmp_path / "t.jsonl", texts), 2, 1), tokenizer)
    assert text.calibration + text.verification == ids(tokenizer, range(3))


def test_nothing_is_left_out_of_text_without_repeats(tmp_path, tokenizer):
    path = write(tmp_path / "t.jsonl", range(9))
    text = load_text(options(path), tokenizer)
    expected = hashlib.sha256("".join(json.dumps(i) for i in ids(tokenizer, range(4))).encode()).hexdigest()
    assert text.note is None and text.calibration_ref().sha256 == expected


def test_too_little_that_differs_is_a_sentence(tmp_path, tokenizer):
    with pytest.raises(
        InputError, match=r"Of 9 documents .* 1 have 8 tokens or more and repeat none before them \(8 do"
    ):
        load_text(options(write(tmp_path / "t.jsonl", [0] * 9)), tokenizer)


def packed(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token by token: documents glued together, N tokens a sequence, each with a BOS in front."""
    found, held = list[list[int]](), list[int]()
    for text in texts:
        for place, token in enumerate(tokenizer(text)["input_ids"]):
            held += [tokenizer.bos_token_id] if place and not held else []
            held.append(token)
            if len(held) == N:
                found, held = [*found, held], []
    return found


def test_of_packed_text_a_repeated_document_counts_a_repeated_heading_does_not(tmp_path, tokenizer):
    """Documents of 22 tokens are three sequences, with the BOS of the second and third; one of 2 tokens shifts that."""
    words = 3 * (N - 1)
    whole = write(tmp_path / "whole.jsonl", [0, 1, 0, 2], words=words)
    text = load_text(options(whole, 6, 3, pack=True), tokenizer)
    assert text.calibration + text.verification == packed(tokenizer, [doc(seed, words) for seed in (0, 1, 2)])
    texts = [t for seed in range(6) for t in ("ball", doc(seed, words))]
    headed = load_text(options(tiny.write_jsonl(tmp_path / "h.jsonl", texts), 10, 9, pack=True), tokenizer)
    assert headed.calibration + headed.verification == packed(tokenizer, texts)[:19]
    assert headed.note is None


def test_a_tokenizer_that_opens_no_text_opens_no_packed_sequence(tmp_path):
    bare = tiny.tokenizer(bos=False)
    text = load_text(options(write(tmp_path / "t.jsonl", [0, 1], words=32), 6, 2, pack=True), bare)
    stream = [i for seed in (0, 1) for i in bare(doc(seed, 32))["input_ids"]]
    assert [i for s in text.calibration + text.verification for i in s] == stream


def test_a_document_longer_than_a_sequence_does_not_repeat_itself(tmp_path, tokenizer):
    text = load_text(options(write(tmp_path / "t.jsonl", [0], words=80), 6, 3, pack=True), tokenizer)
    assert len(text.calibration + text.verification) == 9 and text.note is None


def test_no_sequence_is_in_two_texts(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", range(9)), write(tmp_path / "b.jsonl", [6, 20, 0, 21, 22, 5, 23, 24, 8, 25, 26])
    first, second = load_texts([options(a), options(b)], tokenizer)
    assert first == load_text(options(a), tokenizer)
    assert second.calibration == ids(tokenizer, [20, 21, 22, 23])
    assert second.verification == ids(tokenizer, [24, 8, 25])  # document 8 of the first text was not used there
    assert second.note is not None and "3 sequences are left out" in second.note


def test_further_lots_repeat_nothing_of_any_text(tmp_path, tokenizer):
    a = write(tmp_path / "a.jsonl", [*range(7), 20, 7, 3, 8, 9, 10, 11, 12, 13])
    b = write(tmp_path / "b.jsonl", [*range(20, 27), 9, 30, 31, 32, 33, 33, 34, 35])
    texts = load_texts([options(a), options(b)], tokenizer)
    one, two = further(texts, 1, tokenizer=tokenizer), further(texts, 2, tokenizer=tokenizer)
    assert [t.verification for t in one] == [ids(tokenizer, [7, 8, 9]), ids(tokenizer, [30, 31, 32])]
    assert [t.verification for t in two] == [ids(tokenizer, [10, 11, 12]), ids(tokenizer, [33, 34, 35])]
    assert [t.verification_ref().first for t in two] == [10, 10]
    assert further(texts, 3, tokenizer=tokenizer) is None


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_read_again_by_what_a_profile_says_the_sequences_are_the_same(tmp_path, tokenizer, seed, pack):
    """Texts that share and repeat documents of all lengths, some too short for what is asked of them."""
    random_ = random.Random(seed)
    paths = []
    for name in "abc":
        documents = [doc(random_.randrange(25), random_.randrange(1, 3 * N)) for _ in range(random_.randrange(8, 40))]
        documents += [doc(random_.randrange(100, 10**6), 2 * N) for _ in range(3)]
        paths.append(tiny.write_jsonl(tmp_path / f"{name}.jsonl", documents))
    texts = load_texts([options(p, 10, 5, pack) for p in paths], tokenizer)
    every = [tuple(s) for t in texts for s in t.calibration + t.verification]
    assert len(set(every)) == len(every)
    again = load_texts(
        [options(p, len(t.calibration), len(t.verification), pack) for p, t in zip(paths, texts, strict=True)],
        tokenizer,
    )
    for was, now in zip(texts, again, strict=True):
        assert (was.calibration_ref(), was.verification_ref()) == (now.calibration_ref(), now.verification_ref())
    rounds = [further(which, 1, tokenizer=tokenizer) for which in (texts, again)]
    assert (rounds[0] is None) == (rounds[1] is None)
    if rounds[0]:
        assert [t.verification for t in rounds[0]] == [t.verification for t in rounds[1]]
        assert not {tuple(s) for t in rounds[0] for s in t.verification} & set(every)


TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
CHAT = [{"role": "she", "content": "took the red ball"}, {"role": "he", "content": "lost the map and the key"}]


def chats(path: Path, messages) -> Path:
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    return path


def test_chats_are_written_out_by_the_tokenizers_template(tmp_path):
    tokenizer = tiny.tokenizer()
    path = chats(
        tmp_path / "t.jsonl", [[*CHAT, {"role": WORDS[i], "content": "x", "tool_calls": None}] for i in range(5)]
    )
    with pytest.raises(
        InputError, match=r"line 1: these are chat messages, and the model's tokenizer has no chat temp"
    ):
        load_text(options(path, 2, 1), tokenizer)
    tokenizer.chat_template = TEMPLATE
    text = load_text(TextOptions(str(path), 64, N, 3, 2), tokenizer)
    expected = tokenizer.apply_chat_template([*CHAT, {"role": WORDS[0], "content": "x"}], tokenize=True)["input_ids"]
    assert text.calibration[0] == expected and tokenizer.bos_token_id not in expected
    assert text.calibration_ref().column == "text" and "column" not in text.calibration_ref().model_dump()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"line 1: .* does not take these messages: roles must alternate\."):
        load_text(options(path, 2, 1), tokenizer)


LENGTHS = ("--seq-len", 16, "--device", "cpu")


def test_a_profile_on_text_that_repeats_itself_says_so_and_is_planned_from(spd, llama, text, tmp_path):
    stories = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    path, out = tiny.write_jsonl(tmp_path / "twice.jsonl", stories[:12] * 3 + stories[12:]), tmp_path / "p.json"
    given = (*LENGTHS, "--max-samples", 8, "--verify-samples", 8)
    outcome = spd("profile", llama, "--tp", 2, "--data", path, *given, "-o", out)
    assert outcome.code == 0 and "24 sequences are left out" in " ".join(outcome.err.split()), outcome.err
    twice = read(Profile, out)
    assert spd("profile", llama, "--tp", 2, "--data", text, *given, "-o", out).code == 0
    once = read(Profile, out)
    assert (twice.text.sha256, twice.verify_text.sha256) == (once.text.sha256, once.verify_text.sha256)
    out.write_text(twice.model_dump_json())
    outcome = spd("plan", out, "--max-kl", 9, "-o", tmp_path / "plan.json")
    assert outcome.code == 0 and read(Plan, tmp_path / "plan.json").verified.text == twice.verify_text, outcome.err


def test_one_sequence_has_no_error_and_no_margin(spd, llama, text, tmp_path):
    out = tmp_path / "p.json"
    one = ("--max-samples", 1, "--verify-samples", 1)
    for method in ("single", "fisher"):
        plan = tmp_path / f"{method}-plan.json"
        command = ("profile", llama, "--tp", 2, "--data", text, *LENGTHS, *one, "--method", method, "-o", out)
        outcome = spd(*command)
        assert outcome.code == 0 and "±" not in outcome.err, outcome.err
        found = read(Profile, out)
        assert {error for kls in map(found.kl, found.strategies) for _, error in kls.values()} == {None}
        outcome = spd("plan", out, "--max-kl", 9, "-o", plan)
        said = " ".join(outcome.err.split())
        assert outcome.code == 2 and "wants 4 sequences to measure on, or more" in said, said
        assert not plan.exists()
        outcome = spd("plan", out, "--drop", 2, "-o", plan)
        assert outcome.code == 0 and "±" not in outcome.err, outcome.err
        assert read(Plan, plan).verified.kl_stderr is None
        assert spd("report", out, "--plan", plan, "-o", tmp_path / f"{method}.html").code == 0
        assert spd("diff", plan, plan).code == 0 and spd("diff", out, out).code == 0


def test_one_sequence_to_verify_on_is_too_few(spd, llama, text, tmp_path):
    out = tmp_path / "p.json"
    few = ("--max-samples", 4, "--verify-samples", 1)
    assert spd("profile", llama, "--tp", 2, "--data", text, *LENGTHS, *few, "-o", out).code == 0
    outcome = spd("plan", out, "--max-ppl-increase", "900%", "-o", tmp_path / "plan.json")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "wants 2 sequences to verify on, or more" in said and "--verify-samples" in said, said


@pytest.mark.parametrize("pack", [False, True])
def test_what_a_recovery_was_fitted_on_is_left_out_by_its_content(tmp_path, tokenizer, pack):
    """Of a document that was read in part (packed) the rest is new; in another file, and in other lengths."""
    first = load_text(options(write(tmp_path / "t.jsonl", range(9), words=11), pack=pack), tokenizer)
    again = write(tmp_path / "copy.jsonl", [20, *range(8, -1, -1), 21, 22], words=11)
    text = load_text(replace(options(again, 20, 2, pack), fitted=first.documents), tokenizer)
    used = {tuple(s) for s in first.calibration}
    assert used.isdisjoint(map(tuple, [*text.calibration, *text.verification]))
    assert text.note is not None and "the model was fitted on them" in text.note
    same = load_text(replace(options(tmp_path / "t.jsonl", 1, 1, pack), fitted=first.documents), tokenizer)
    assert same.calibration + same.verification == first.verification[:2]  # behind what was fitted on, at once


def test_further_text_leaves_out_what_was_fitted_on(tmp_path, tokenizer):
    path = write(tmp_path / "t.jsonl", range(12))
    fitted = load_text(options(write(tmp_path / "fitted.jsonl", [1, 5, 8, 9]), 3, 1), tokenizer).documents
    text = load_text(replace(options(path, 2, 2), fitted=fitted), tokenizer)
    assert text.calibration + text.verification == ids(tokenizer, [0, 2, 3, 4])
    (more,) = further([text], 1, tokenizer=tokenizer) or [None]
    assert more is not None and more.verification == ids(tokenizer, [6, 7])
    (last,) = further([text], 2, tokenizer=tokenizer) or [None]
    assert last is not None and last.verification == ids(tokenizer, [9, 10])  # 8 was fitted on, 9 verified by
