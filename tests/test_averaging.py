"""Several calibration texts: each by itself, their mean, and plans that hold on each."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from profiles import DROP, a, budget, chosen, comparison, make_profile

from spd_calib.formats.files import dumps, read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Comparison, Profile

LENGTHS = ("--seq-len", 16, "--max-samples", 5, "--verify-samples", 3)


@pytest.fixture(scope="module")
def other_text(tmp_path_factory, text) -> Path:
    """The same documents with their characters in reverse: text of another kind."""
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    path = tmp_path_factory.mktemp("other") / "other.jsonl"
    path.write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def both_file(tmp_path_factory, llama, text, other_text) -> Path:
    from spd_calib import RunOptions, TextSelection, profile

    path, data = tmp_path_factory.mktemp("both") / "both.json", [str(text), str(other_text)]
    selection = TextSelection(seq_len=16, max_samples=5, verify_samples=3)
    path.write_text(dumps(profile(str(llama), tp=2, data=data, text=selection, run=RunOptions(device="cpu"))))
    return path


def of_one(spd, llama, text, path) -> Profile:
    outcome = spd("profile", llama, "--tp", 2, "--data", text, *LENGTHS, "--device", "cpu", "-o", path)
    assert outcome.code == 0, outcome.err
    return read(Profile, path)


def test_the_profile_holds_each_text_as_measured_alone_and_their_mean(
    spd, llama, text, other_text, both_file, tmp_path
):
    alone = [of_one(spd, llama, t, tmp_path / "one.json") for t in (text, other_text)]
    both = read(Profile, both_file)
    assert both.text.parts == [p.text for p in alone] and both.verify_text.parts == [p.verify_text for p in alone]
    assert (both.text.sequences, both.text.tokens) == (10, 160) and both.text.source == f"{text}, {other_text}"
    assert both.baseline.per_text == [p.baseline for p in alone]
    assert both.baseline.nll == pytest.approx(sum(p.baseline.nll for p in alone) / 2)
    assert both.baseline.ppl == pytest.approx(sum(p.baseline.ppl for p in alone) / 2)
    for m, x, y in zip(both.measurements, *(p.measurements for p in alone), strict=True):
        assert (m.block, m.strategy, m.dropped) == (x.block, x.strategy, x.dropped)
        alike = [{name: getattr(of_one, name) for name in Comparison.model_fields} for of_one in (x, y)]
        assert [vars(own) for own in m.per_text] == alike
        assert m.kl == pytest.approx((x.kl + y.kl) / 2) and m.ppl == pytest.approx((x.ppl + y.ppl) / 2)
        assert m.kl_stderr == pytest.approx(math.sqrt(x.kl_stderr**2 + y.kl_stderr**2) / 2)
        assert m.accuracy_drop == pytest.approx((x.accuracy_drop + y.accuracy_drop) / 2)
        assert m.max_abs_logprob_diff == max(x.max_abs_logprob_diff, y.max_abs_logprob_diff)
        assert (m.tokens, m.sequences) == (x.tokens + y.tokens, 10)


def test_one_text_leaves_no_trace_of_several(profile_file):
    assert "per_text" not in profile_file.read_text() and "parts" not in profile_file.read_text()


def test_the_terminal_shows_each_text(spd, llama, text, other_text, both_file, tmp_path):
    outcome = spd("plan", both_file, "--max-kl", "9", "--each-text", "-o", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    assert "verified, text by text" in outcome.err and "on each text, KL 9" in " ".join(outcome.err.split())
    plan = read(Plan, tmp_path / "plan.json")
    assert plan.budget.each_text and [t.source for t in plan.verified.text.parts] == [str(text), str(other_text)]
    own = plan.verified.per_text
    assert len(own) == 2 and plan.verified.kl == pytest.approx((own[0].kl + own[1].kl) / 2) and own[0] != own[1]
    dry = spd("profile", llama, "--tp", 2, "--data", text, "--data", other_text, *LENGTHS, "--dry-run", "--json")
    assert json.loads(dry.out)["batches"] == 2 and json.loads(dry.out)["tokens"] == 160


def test_fisher_of_two_texts_is_the_mean_of_each(spd, llama, text, other_text, tmp_path):
    options = ("--tp", 2, *LENGTHS, "--device", "cpu", "--method", "fisher", "--sync-points", "attention,mlp")
    alone = []
    for data in (text, other_text):
        assert spd("profile", llama, "--data", data, *options, "-o", tmp_path / "one.json").code == 0
        alone.append(read(Profile, tmp_path / "one.json"))
    both_of = ("profile", llama, "--data", text, "--data", other_text, *options, "-o", tmp_path / "both.json")
    outcome = spd(*both_of)
    assert outcome.code == 0 and "text by text" in outcome.err, outcome.err
    both = read(Profile, tmp_path / "both.json")
    assert both.fisher.per_text == [p.fisher for p in alone] and both.baseline.per_text == [p.baseline for p in alone]
    one, two = (p.fisher for p in alone)
    for i, row in enumerate(both.fisher.matrix):
        assert row == pytest.approx([(x + y) / 2 for x, y in zip(one.matrix[i], two.matrix[i], strict=True)])
        pairs = zip(one.stderr[i], two.stderr[i], strict=True)
        assert both.fisher.stderr[i] == pytest.approx([math.sqrt(x**2 + y**2) / 2 for x, y in pairs])
    assert both.fisher.sampling_error == max(one.sampling_error, two.sampling_error)
    outcome = spd("plan", tmp_path / "both.json", "--max-kl", "9", "--each-text", "-o", tmp_path / "plan.json")
    assert outcome.code == 0 and len(read(Plan, tmp_path / "plan.json").verified.per_text) == 2, outcome.err
    dry = spd(*both_of, "--dry-run", "--json")
    assert json.loads(dry.out)["tokens"] == 160
    document = json.loads((tmp_path / "both.json").read_text())
    document["fisher"]["per_text"].pop()
    with pytest.raises(ValueError, match="1 texts' own results were found, of 2 texts"):
        Profile.model_validate(document)


def of_texts(*kls: float) -> Comparison:
    parts = [comparison(kl) for kl in kls]
    return comparison(sum(kls) / len(kls)).model_copy(update={"per_text": parts})


def test_a_budget_on_each_text_is_stricter_than_on_their_mean():
    """On the second text block 2 costs far more than on the first, and block 1 a little more."""
    costs = {0: (0.01, 0.01), 1: (0.02, 0.03), 2: (0.0, 0.09)}
    p = make_profile([sum(costs[b]) / 2 for b in range(3)])

    def measure(sets):
        return [of_texts(*(sum(costs[q.block][t] for q in drops) for t in (0, 1))) for drops in sets]

    on_mean = chosen(p, budget(value=0.085, strategies=[DROP]), measure, measure)
    assert set(on_mean.drops) == {a(0), a(1), a(2)}
    on_each = chosen(p, budget(value=0.085, strategies=[DROP], each_text=True), measure, measure)
    assert set(on_each.drops) == {a(0), a(1)}


def test_a_resumed_profile_of_two_texts_is_the_same_file(spd, llama, text, other_text, tmp_path, monkeypatch):
    from spd_calib.sensitivity import profile as profiling

    command = ("profile", llama, "--tp", 2, "--data", text, "--data", other_text, *LENGTHS, "-o", tmp_path / "p.json")
    assert spd(*command).code == 0
    whole = (tmp_path / "p.json").read_bytes()
    real, calls = profiling.measure, []

    def stops_on_the_second_text(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(profiling, "measure", stops_on_the_second_text)
    assert spd(*command).code != 0
    assert len((tmp_path / "p.json.journal").read_text().splitlines()) == 1 + 9  # of the first text: dense, 2 x 4
    monkeypatch.setattr(profiling, "measure", real)
    outcome = spd(*command)
    assert outcome.code == 0 and "9 measurements are finished" in " ".join(outcome.err.split())
    assert (tmp_path / "p.json").read_bytes() == whole


@pytest.mark.parametrize("data", ["one", ["one"], ["one", "two"]])
def test_a_recipe_names_one_text_or_several(spd, llama, text, other_text, tmp_path, data):
    for name, path in (("one", text), ("two", other_text)):
        shutil.copy(path, tmp_path / f"{name}.jsonl")
    named = [str(tmp_path / f"{name}.jsonl") for name in ([data] if isinstance(data, str) else data)]
    section = {"model": str(llama), "tp": 2, "data": named[0] if isinstance(data, str) else named, "seq_len": 16}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"profile": {**section, "max_samples": 2, "verify_samples": 2}}))
    outcome = spd("profile", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "p.json")
    assert outcome.code == 0, outcome.err
    assert [t.source for t in read(Profile, tmp_path / "p.json").text.each] == named


def test_what_several_texts_do_not_go_with(spd, llama, text, other_text, both_file, profile_file):
    two = ("profile", llama, "--tp", 2, "--data", text, "--data")
    for command, words in [
        ((*two, text), "names one text twice"),
        ((*two, other_text, "--confidence", "0.9"), "measured to their end"),
        (("plan", both_file, "--drop", "1", "--each-text"), "--each-text needs a budget of a cost"),
        (("plan", profile_file, "--max-kl", "1", "--each-text"), "profile of several texts"),
        (("plan", both_file, "--max-accuracy-drop", "1", "--each-text", "--tasks", "demo"), "leave --each-text out"),
    ]:
        outcome = spd(*command)
        assert outcome.code == 2 and words in outcome.err.replace("\n", " "), outcome.err


def test_a_profile_that_lacks_one_texts_results_is_refused(both_file, tmp_path):
    document = json.loads(both_file.read_text())
    document["measurements"][0]["per_text"].pop()
    with pytest.raises(ValueError, match="1 texts' own results were found, of 2 texts"):
        Profile.model_validate(document)


def test_what_gives_sync_points_back_is_verified_on_the_text_that_follows(spd, llama, text, tmp_path):
    """Of a largest difference there is no standard error to spare: a budget just below what it is on held-out text."""
    profile, plan = tmp_path / "p.json", tmp_path / "plan.json"
    lengths = ("--seq-len", 16, "--max-samples", 4, "--verify-samples", 4, "--device", "cpu")
    assert spd("profile", llama, "--tp", 2, "--data", text, *lengths, "-o", profile).code == 0
    kept, repaired = read(Profile, profile).verify_text, 0
    for n in range(2, 5):
        assert spd("plan", profile, "--drop", n, "-o", plan).code == 0
        budget = 0.999 * read(Plan, plan).verified.max_abs_logprob_diff
        outcome = spd("plan", profile, "--max-logprob-diff", budget, "-o", plan)
        if outcome.code == 0 and "repaired: " in outcome.err:
            repaired += 1
            verified = read(Plan, plan).verified
            assert "further text, not used before" in " ".join(outcome.err.split())
            rounds = (verified.text.first - kept.first) / kept.sequences
            assert rounds == verified.round >= 1 and verified.text.sequences == kept.sequences
            assert not verified.reused and verified.max_abs_logprob_diff <= budget
    assert repaired
