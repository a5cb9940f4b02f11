"""diff: values by hand and by scipy's own tests, false alarms counted, two texts of one kind and of two, the screen."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from plans import write_plan
from profiles import make_profile
from scipy import stats
from screens import command, on_terminal

from spd_calib.errors import InputError
from spd_calib.formats.drops import Strategy
from spd_calib.formats.files import dumps, read
from spd_calib.formats.plan import Budget, Latency, Plan, Request
from spd_calib.formats.profile import Profile
from spd_calib.reporting.agreement import agreements
from spd_calib.reporting.diff import diff_plans, diff_profiles

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP


def profile_of(kl, stderr=0.01, text="1", sequences=16, **changes) -> Profile:
    """A profile of block_drop, KLs and standard errors as given, of the text with that hash."""
    made = make_profile(kl, **changes)
    errors = [stderr] * len(kl) if isinstance(stderr, float) else stderr
    rows = [
        m.model_copy(update={"kl_stderr": e, "sequences": sequences})
        for m, e in zip(made.measurements, [*errors, *[0.01] * len(made.measurements)], strict=False)
    ]
    ref = made.text.model_copy(update={"sha256": text * 64, "source": text, "sequences": sequences})
    return made.model_copy(update={"measurements": rows, "text": ref})


def test_each_block_is_welchs_test():
    a = profile_of([0.1, 0.5, 0.3], [0.01, 0.02, 0.05], "1", 8)
    b = profile_of([0.12, 0.4, 0.31], [0.02, 0.03, 0.01], "2", 20)
    found = diff_profiles(a, b)
    ps = []
    for row in found.agreements[0].rows:
        for_a, for_b = (row.a, row.a_stderr * 8**0.5, 8), (row.b, row.b_stderr * 20**0.5, 20)
        t, p = stats.ttest_ind_from_stats(*for_a, *for_b, equal_var=False)
        assert (row.apart, row.p) == (pytest.approx(-t), pytest.approx(p))
        ps.append(p)
    assert found.p == pytest.approx(3 * min(ps))
    assert [row.beyond for row in found.agreements[0].rows] == [False, True, False]
    equal = diff_profiles(profile_of([0.1, 0.2, 0.3]), profile_of([0.1, 0.2, 0.3], text="2"))
    assert equal.p == 1 and equal.agreements[0].beyond_by_chance == pytest.approx(3 * 2 * stats.t.sf(2, 30))


def test_ranks_and_sets_by_hand():
    """Blocks 0 to 3 in the order 0 1 2 3 and 1 0 2 3: one of six pairs the other way round."""
    a, b = profile_of([0.1, 0.2, 0.3, 0.4], 1e-9), profile_of([0.2, 0.1, 0.3, 0.4], 1e-9, "2")
    (found,) = diff_profiles(a, b).agreements
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15)) and found.kendall == pytest.approx((5 - 1) / 6)
    assert found.spearman_range == pytest.approx((0.8, 0.8))
    assert [(row.a_rank, row.b_rank) for row in found.rows] == [(1, 2), (2, 1), (3, 3), (4, 4)]
    assert [(o.size, o.only_a, o.only_b) for o in found.other_sets] == [(1, [0], [1])]
    low, high = diff_profiles(profile_of([0.1, 0.2, 0.3, 0.4], 0.2), b).agreements[0].spearman_range
    assert low < 0 < 0.8 <= high
    assert diff_profiles(profile_of([0.1, 0.2]), profile_of([0.1, 0.2], text="2")).agreements[0].spearman is None


def test_another_tier_and_why():
    """Mean 0.1 on both sides, so the thresholds are 0.025 and 0.1."""
    a = profile_of([0.01, 0.02, 0.27, 0.1], 0.001)
    b = profile_of([0.01, 0.09, 0.2, 0.1], 0.001, "2")
    (said,) = agreements(a, b, tested=True)[0].changed
    assert said.startswith("block 1: insensitive in A, sensitive in B: KL 0.02 ± 0.001 against 0.09 ± 0.001;")
    assert "0.025 and 0.1" in said and said.endswith("49.5 standard errors apart")
    b = profile_of([0.01, 0.0201, 0.02, 0.01], 0.001, "2")  # mean 0.015: only the thresholds moved for block 1
    said = next(s for s in agreements(a, b, tested=True)[0].changed if s.startswith("block 1"))
    assert "extremely sensitive in B" in said and "thresholds, shares of the mean KL, decide" in said


def test_false_alarms_are_as_rare_as_promised():
    """Texts of one kind, KLs of a sequence lognormal and correlated between blocks (a hard one is hard for all)."""
    dice, alarms, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        common = dice.standard_normal((2, 1, 24))
        kl = np.exp(-3 + 0.5 * common + 0.5 * dice.standard_normal((2, 6, 24)))
        sides = zip(kl.mean(-1).tolist(), (kl.std(-1, ddof=1) / 24**0.5).tolist(), "12", strict=True)
        alarms += diff_profiles(*(profile_of(mean, error, text, 24) for mean, error, text in sides)).p < 0.05
    assert alarms / tries <= 0.06


def test_what_differs_is_named_and_doubted():
    a = profile_of([0.1, 0.2, 0.3], 0.001)
    b = profile_of([0.2, 0.2, 0.3], 0.001, "2")
    other = b.model_copy(update={"tensor_parallel": b.tensor_parallel.model_copy(update={"size": 4})})
    assert [d.what for d in diff_profiles(a, b).differing] == ["text"]
    found = diff_profiles(a, other)
    assert [(d.what, d.a, d.b) for d in found.differing if d.what != "text"] == [("TP size", "2", "4")]
    assert found.answer[0].startswith("Yes") and any(
        "Not the text alone differs, but TP size" in s for s in found.answer
    )
    first = a.text.model_copy(update={"sha256": "3" * 64})
    overlapping = b.model_copy(update={"text": first.model_copy(update={"first": 12})})
    assert any(s.startswith("4 sequences are in both texts") for s in diff_profiles(a, overlapping).answer)
    of_two = overlapping.text.model_copy(update={"parts": [overlapping.text, b.text]})  # b's own is another file
    found = diff_profiles(a, overlapping.model_copy(update={"text": of_two}))
    assert any(s.startswith("4 sequences are in both texts") for s in found.answer)


@pytest.mark.parametrize(
    ("b", "why"),
    [
        (profile_of([0.3, 0.1, 0.2], text="1"), "of the same text"),
        (profile_of([0.3, 0.1, 0.2], text="2", method="cumulative"), "cumulative"),
        (profile_of([0.3, 0.1, 0.2], text="2", sequences=1), "One sequence"),
        (profile_of([0.3, 0.1, 0.2], 0.0, "2"), None),
    ],
)
def test_no_test_where_the_errors_say_nothing(b, why):
    found = diff_profiles(profile_of([0.1, 0.2, 0.3]), b)
    assert (found.p is None) == (why is not None) and (why is None or why in found.answer[0])
    assert b.method == "cumulative" or found.agreements[0].spearman == pytest.approx(-0.5)


def test_only_what_both_measured_is_compared():
    a, b = (
        profile_of([0.1, 0.2, 0.3], plain_drop=[0.2, 0.3, 0.4]),
        profile_of([0.1, 0.2, 0.3], text="2", mlp=[0.1, 0.2]),
    )
    found = diff_profiles(a, b)
    assert [(g.sync_point, g.strategy) for g in found.agreements] == [("attention", DROP)]
    assert {d.what for d in found.differing} == {"text", "strategies", "kinds of sync points"}
    plain = a.model_copy(update={"measurements": [m for m in a.measurements if m.strategy == PLAIN]})
    with pytest.raises(InputError, match="no sync point under the same strategy"):
        diff_profiles(plain, b)
    with pytest.raises(InputError, match="3 blocks and B of one with 2"):
        diff_profiles(a, profile_of([0.1, 0.2]))


@pytest.fixture(scope="module")
def texts(tmp_path_factory, llama) -> dict[str, Path]:
    """Profiles of one model: on two halves of a text, and on a text of another kind, one word over and over."""
    place, made = tmp_path_factory.mktemp("texts"), {}
    stories = tiny.stories(80)
    kinds = {"first": stories[:40], "second": stories[40:], "words": [" ".join([w] * 40) for w in tiny.WORDS[:40]]}
    for name, documents in kinds.items():
        data = tiny.write_jsonl(place / f"{name}.jsonl", documents)
        made[name] = place / f"{name}.json"
        sizes = ["--seq-len", 32, "--max-samples", 32, "--verify-samples", 8, "--strategy", "block_drop"]
        words = ["profile", llama, "--tp", 4, "--data", data, "-o", made[name], *sizes, "--device", "cpu"]
        shown = on_terminal(command(*words))
        assert shown.code == 0, shown.raw
    return made


def test_two_halves_of_a_text_show_no_dependence_and_another_kind_does(spd, texts):
    same = spd("diff", texts["first"], texts["second"])
    assert same.code == 0 and "No evidence" in same.err and "would go unseen" in " ".join(same.err.split())
    assert same.out == ""
    other = spd("diff", texts["first"], texts["words"], "--json")
    assert other.code == 0 and "Yes, what a drop costs depends on the data" in " ".join(other.err.split())
    found = json.loads(other.out)
    assert found["p"] < 0.01 and {"text", "dense perplexity"} == {d["what"] for d in found["differing"]}
    rows = found["agreements"][0]["rows"]
    assert [row["a"] for row in rows] == [m.kl for m in read(Profile, texts["first"]).measurements]
    itself = spd("diff", texts["first"], texts["first"])
    assert itself.code == 0 and "what differs in what was measured: nothing" in itself.err


@pytest.fixture
def plans(llama, tmp_path) -> list[Path]:
    """Two plans that differ in block 1's attention and block 2's MLP."""
    a = write_plan(tmp_path / "a.json", llama, 2, [DROP, KEEP, DROP, KEEP])
    b = write_plan(tmp_path / "b.json", llama, 2, [DROP, DROP, DROP, KEEP], [KEEP, KEEP, DROP, KEEP])
    return [a, b]


def changed(path: Path, **changes) -> Plan:
    plan = read(Plan, path).model_copy(update=changes)
    path.write_text(dumps(plan))
    return plan


def test_plans_side_by_side(spd, plans):
    a = read(Plan, plans[0])
    latency = Latency(
        hardware="h", phase="decode", batch=1, context=8, all_reduce_seconds=1e-5, dense_seconds=1.0,
        planned_seconds=0.75, saved=0.25, ceiling=0.5,
    )  # fmt: skip
    b = changed(plans[1], budget=Budget(kind="max_kl", value=0.5, strategies=[DROP]), latency=[latency])
    found = diff_plans(a, b)
    points = [(s.point.block, s.point.sync_point, s.a, s.b) for s in found.strategies]
    assert points == [(1, "attention", KEEP, DROP), (2, "mlp", KEEP, DROP)]
    differing = {d.what: (d.a, d.b) for d in found.differing}
    assert differing == {"asked for": ("1 sync points dropped", "KL 0.5"), "requires": ("nothing", "mlp_drop")}
    whole = {d.what: (d.a, d.b) for d in found.whole}
    assert whole["sync points dropped"] == ("2", "4") and whole["all-reduces a forward"] == ("6", "4")
    assert whole["decode saved, h, batch 1, context 8"] == ("", "25.0 %")
    assert found.answer == ["2 sync points differ: other budgets were asked for."]
    shown = on_terminal(command("diff", *plans, "--json"))
    assert shown.code == 0 and max(map(len, shown.lines)) <= 60
    assert [s["point"]["block"] for s in json.loads(shown.out)["strategies"]] == [1, 2]
    assert "2 MLP" in shown.tables and "block_drop" in shown.tables


def test_why_plans_differ(plans):
    def with_kl(path: Path, *kl: float) -> Plan:
        plan = read(Plan, path)
        return plan.model_copy(
            update={"blocks": [b.model_copy(update={"kl": x}) for b, x in zip(plan.blocks, kl, strict=True)]}
        )

    a, b = with_kl(plans[0], 1, 2, 3, 4), with_kl(plans[1], 1, 2, 3, 5)
    assert diff_plans(a, a).answer == ["Both plans drop the same sync points in the same way."]
    assert "the budget is the same, the KLs alone that both name differ at 1 of 4" in diff_plans(a, b).answer[0]
    same = with_kl(plans[1], 1, 2, 3, 4)
    assert "the budget and the KLs alone are the same" in diff_plans(a, same).answer[0]
    with_bits = same.model_copy(
        update={
            "blocks": [
                b.model_copy(update={"mlp_sync_bits": 4} if b.mlp_strategy == "keep_sync" else {}) for b in same.blocks
            ],
            "requires": ["quantised_sync"],
        }
    )
    assert diff_plans(a, with_bits).answer[0].endswith("the same; other bits of syncs were asked for.")
    longer, longest = (
        same.model_copy(
            update={
                "request": Request(
                    hardware="h", batch=1, prompt=8, new_tokens=n, dense_seconds=2.0, one_choice_seconds=1.5,
                    two_choices_seconds=1.5, planned_seconds=1.5, saved=0.25,
                ),
                "verified": same.verified.model_copy(update={"as_served": n > 2}),
            }
        )
        for n in (2, 64)
    )  # fmt: skip
    of_requests = diff_plans(a.model_copy(update={"request": longer.request}), longest)
    assert of_requests.answer[0].endswith("the same; other requests or steps to save time of were asked for.")
    assert {d.what: (d.a, d.b) for d in of_requests.differing} == {
        "requires": ("nothing", "mlp_drop"),
        "verified": ("in one forward", "as it is served"),
        "planned for": tuple(f"a request of 8 + {n} tokens, batch 1, h" for n in (2, 64)),
    }
    wider = same.model_copy(update={"budget": a.budget.model_copy(update={"value": 4})})
    assert diff_plans(a, wider).answer[0].endswith("other budgets were asked for, of the same sensitivities.")


def test_profiles_on_a_narrow_terminal(texts):
    shown = on_terminal(command("diff", texts["first"], texts["words"]))
    assert shown.code == 0 and shown.out == "" and max(map(len, shown.lines)) <= 60
    for m in read(Profile, texts["words"]).measurements:
        assert f"{m.kl:.3g} ± {m.kl_stderr:.1g}" in shown.tables
