"""Budgets and the search, on profiles made by hand and measurements that are functions."""

import itertools
import json

import numpy as np
import pytest
import tiny

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import ModelRef, Provenance, Strategy, TensorParallel, TextRef
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Baseline, Comparison, Fisher, Measurement, Point, Profile
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.planning import budget as budgets
from spd_calib.planning.front import front_of, knee
from spd_calib.planning.interactions import Interactions
from spd_calib.planning.obvious import paper_order
from spd_calib.planning.plan import Obvious, measure_sets
from spd_calib.planning.search import candidates, choose, interactions_of, tier
from spd_calib.sensitivity.fisher import fisher as fisher_scores

DROP, PLAIN = Strategy.BLOCK_DROP, Strategy.PLAIN_DROP


def comparison(kl: float, accuracy_drop: float | None = None, ppl: float | None = None) -> Comparison:
    return Comparison(
        kl=kl,
        kl_stderr=0.001,
        nll_increase=kl,
        nll_increase_stderr=0.001,
        ppl=ppl or 10 * (1 + kl),
        ppl_increase=kl if ppl is None else ppl / 10 - 1,
        accuracy_drop=kl / 4 if accuracy_drop is None else accuracy_drop,
        accuracy_drop_stderr=0.001,
        top1_agreement=0.9,
        top1_agreement_stderr=0.01,
        max_abs_logprob_diff=1,
        tokens=100,
        sequences=64,
    )


def a(block: int) -> Point:
    return Point(block=block, sync_point="attention")


def m(block: int) -> Point:
    return Point(block=block, sync_point="mlp")


def make_profile(block_drop, plain_drop=None, method="single", rank_by="kl", mlp=(), **changes) -> Profile:
    """A profile whose KL per block and strategy is as given, and per MLP where there are any."""
    n = len(block_drop)
    rows = []
    for strategy, values in ((DROP, block_drop), (PLAIN, plain_drop or [])):
        for block, kl in enumerate(values):
            dropped = [block] if method == "single" else list(range(block, n))
            rows.append(Measurement(**vars(comparison(kl)), block=block, strategy=strategy, dropped=dropped))
    for block, kl in enumerate(mlp):
        rows.append(Measurement(**vars(comparison(kl)), block=block, sync_point="mlp", strategy=DROP, dropped=[block]))
    text = TextRef(source="t", seq_len=8, min_len=8, pack=False, first=0, sequences=64, tokens=512, sha256="0" * 64)
    return Profile(
        model=ModelRef(id="m", architecture="A", num_blocks=n, config_hash="0" * 64, weight_fingerprint="1" * 64),
        tensor_parallel=TensorParallel(size=2),
        method=method,
        rank_by=rank_by,
        text=text,
        verify_text=text,
        baseline=Baseline(nll=2.3, ppl=10, top1_accuracy=0.5, tokens=100),
        measurements=rows,
        provenance=Provenance(command="c", seed=0, device="cpu", dtype="float32", versions={}),
        **changes,
    )


def budget(kind="max_kl", value=0.1, strategies=(DROP, PLAIN), **more) -> Budget:
    return Budget(kind=kind, value=value, strategies=list(strategies), **more)


def total(costs, factor=1.0):
    """A model of the world in which sets cost `factor` times their sum."""
    return lambda sets: [comparison(factor * sum(costs[p.block] for p in drops)) for drops in sets]


def test_sensitivity_of_cumulative_profiles_is_the_difference_of_consecutive_perplexities():
    p = make_profile([0.7, 0.4, 0.1], method="cumulative")
    assert p.sensitivity(DROP, "ppl") == pytest.approx({2: 1.0, 1: 3.0, 0: 3.0})  # points of perplexity, base 10
    assert p.sensitivity(DROP, "kl") == pytest.approx({2: 0.1, 1: 0.3, 0: 0.3})
    assert p.ranking(DROP, "ppl")[0] == 2


def test_ranking_by_accuracy_breaks_ties_by_kl():
    p = make_profile([0.3, 0.1, 0.2], rank_by="accuracy")
    rows = [m.model_copy(update={"accuracy_drop": 0.0}) for m in p.measurements]
    assert p.model_copy(update={"measurements": rows}).ranking(DROP) == [1, 2, 0]


def test_lm_eval_accuracy_ranks_where_there_is_some():
    p = make_profile([0.1, 0.2, 0.3], rank_by="accuracy")
    rows = [
        m.model_copy(update={"task_accuracy_drop": {"a": d, "b": d + 0.1}})
        for m, d in zip(p.measurements, (0.3, 0.1, 0.2), strict=True)
    ]
    p = p.model_copy(update={"measurements": rows})
    assert p.ranking(DROP) == [1, 2, 0]
    assert p.sensitivity(DROP)[0] == pytest.approx(0.35)


def test_plain_drop_only_where_it_measures_as_harmless():
    p = make_profile([0.010, 0.020, 0.030], [0.011, 0.080, 0.0321])
    found = {c.block: c.strategy for c in candidates(p, budget())}
    assert found == {0: PLAIN, 1: DROP, 2: DROP}


def test_the_longest_run_that_keeps_the_budget_is_found():
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    p = make_profile(costs)
    choice = choose(p, budget(value=0.103, strategies=[DROP]), total(costs), total(costs))
    assert [c.block for c in choice.dropped] == [1, 2, 4, 3]
    assert choice.verified.kl == pytest.approx(0.1) and choice.repaired == 0


def test_the_calibration_text_must_keep_the_budget_with_two_standard_errors_to_spare():
    """0.1 with an error of 0.001: a budget of 0.102 is kept for sure, one of 0.1019 is not."""
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    for value, n in ((0.1021, 4), (0.1019, 3)):
        choice = choose(make_profile(costs), budget(value=value, strategies=[DROP]), total(costs), total(costs))
        assert len(choice.dropped) == n and choice.repaired == 0
    m = comparison(0.05)
    assert budgets.stderr(Budget(kind="max_ppl_increase", value=1, strategies=[DROP]), m) == pytest.approx(1.05 * 0.001)
    one = choose(make_profile([0.05]), budget(value=0.051, strategies=[DROP]), total([0.05]), total([0.05]))
    assert [c.block for c in one.dropped] == [0]  # too close to say; the held-out text decides


def test_sets_that_cost_more_than_their_sum_are_measured_not_believed():
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    choice = choose(make_profile(costs), budget(value=0.1, strategies=[DROP]), total(costs, 1.5), total(costs, 1.5))
    assert [c.block for c in choice.dropped] == [1, 2, 4]


def test_a_budget_broken_on_held_out_text_is_repaired():
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    choice = choose(make_profile(costs), budget(value=0.103, strategies=[DROP]), total(costs), total(costs, 2.0))
    assert [c.block for c in choice.dropped] == [1, 2]
    assert choice.verified.kl <= 0.103 and choice.repaired == 2


def test_text_that_showed_a_budget_broken_is_spent():
    """Verified twice: of the set that was broken, and, on other text, of what is left of it."""
    costs, told = [0.05, 0.01, 0.02, 0.04, 0.03], []

    def verify(sets):
        told.append(len(sets[0]))
        return total(costs, 2.0 if len(told) == 1 else 1.5)(sets)

    def choice(value):
        told.clear()
        return choose(make_profile(costs), budget(value=value, strategies=[DROP]), total(costs), verify,
                      spent=lambda: told.append("spent"))  # fmt: skip

    assert choice(0.103).verified.kl == pytest.approx(0.045) and told == [4, "spent", 2]
    choice(0.203)
    assert told == [5, "spent", 4]
    with pytest.raises(SpdError):
        choice(0.014)
    assert told == [1, 1]  # nothing is left to verify on other text


def test_a_budget_that_cannot_be_met_names_the_best_plan_found():
    costs = [0.05, 0.01]
    with pytest.raises(SpdError, match=r"block 1 alone with block_drop, costs KL 0.02 .*raise --max-kl") as e:
        choose(make_profile(costs), budget(value=0.005, strategies=[DROP]), total(costs), total(costs, 2.0))
    assert e.value.exit_code == 1


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("value", [0.02, 0.05, 0.11, 0.2, 0.6, 9.0])
def test_no_longer_run_would_have_kept_the_budget(value, factor):
    costs = [0.05, 0.01, 0.02, 0.04, 0.03, 0.08, 0.1, 0.015]
    world = total(costs, factor)
    order = sorted(range(8), key=lambda b: costs[b])
    try:
        n = len(choose(make_profile(costs), budget(value=value, strategies=[DROP]), world, world).dropped)
    except SpdError:
        n = 0
    fits = [k for k in range(9) if world([map(a, order[:k])])[0].kl <= value]
    assert n == max(fits)


def test_a_number_of_drops_takes_the_least_sensitive():
    costs = [0.05, 0.01, 0.02]
    choice = choose(make_profile(costs), budget("drop", 2, [DROP]), total(costs), total(costs))
    assert [c.block for c in choice.dropped] == [1, 2]


def test_the_papers_thresholds_make_three_tiers():
    p = make_profile([0.001, 0.03, 0.2])  # 0.01, 0.3 and 2 points of perplexity
    b = budget("tau", 0.1, [DROP], tau2=1.0)
    found = {c.block: tier(p, b, c) for c in candidates(p, b)}
    assert found == {0: "insensitive", 1: "sensitive", 2: "extremely sensitive"}
    assert [c.block for c in choose(p, b, total([0] * 3), total([0] * 3)).dropped] == [0]


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_fractions(text, value):
    assert budgets.fraction(text, "--max-kl") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "x", "-1%", "nan", "inf", "1%%", "-0.1"])
def test_fractions_that_are_none(text):
    with pytest.raises(InputError, match="--max-kl"):
        budgets.fraction(text, "--max-kl")


@pytest.mark.parametrize(("text", "n"), [("5", 5), ("60%", 5), ("0%", 0), ("100%", 8), ("0", 0)])
def test_numbers_of_blocks(text, n):
    assert budgets.blocks(text, 8) == n


@pytest.mark.parametrize("text", ["9", "101%", "1.5", "-1", "all"])
def test_numbers_of_blocks_that_are_none(text):
    with pytest.raises(InputError, match="--drop"):
        budgets.blocks(text, 8)


def test_a_strategy_that_was_not_profiled_cannot_be_planned():
    with pytest.raises(InputError, match="plain_drop"):
        candidates(make_profile([0.1]), budget(strategies=[PLAIN]))


def test_formats_round_trip_and_refuse_what_they_do_not_know(tmp_path):
    from spd_calib.formats.files import dumps, read

    p = make_profile([0.1, 0.2], [0.3, 0.4])
    path = tmp_path / "p.json"
    path.write_text(dumps(p))
    assert read(Profile, path) == p
    good = json.loads(dumps(p))
    for change, word in [
        ({"version": 2}, "version 2"),
        ({"format": "spd-calib/plan"}, "not a profile"),
        ({"extra": 1}, "extra"),
        ({"method": "guess"}, "method"),
        ({"measurements": []}, "measurements"),
        ({"baseline": {**good["baseline"], "ppl": float("nan")}}, "baseline.ppl"),
        ({"measurements": [{**good["measurements"][0], "block": 7, "dropped": [7]}]}, "block 7"),
        ({"measurements": [{**good["measurements"][0], "kl": "0.1"}]}, "kl"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=word):
            read(Profile, path)


def test_consecutive_sync_points_are_not_taken_for_independent():
    """Alone 0.02 each; the debts of two that follow each other add up, so their amplitudes do."""
    p = make_profile([0.02, 0.02, 0.02], mlp=[0.02, 0.02])
    model = interactions_of(p, candidates(p, budget(strategies=[DROP])))
    assert model.points == (a(0), m(0), a(1), m(1), a(2))
    assert model.kl(frozenset([0, 1])) == pytest.approx(0.08) and model.kl(frozenset([0, 2])) == pytest.approx(0.04)
    assert model.points_of(model.front()[3]) == [a(0), a(1), a(2)]


def random_fisher(n_blocks: int, seed: int) -> Fisher:
    """The Gram matrix of random scores, with the terms of both kinds of sync points."""
    rng = np.random.default_rng(seed)
    points = [p for i in range(n_blocks) for p in (a(i), m(i))][:-1]
    terms = [[p] for p in points] + [list(pair) for pair in itertools.pairwise(points)]
    d = rng.normal(size=(40, len(terms))) * rng.uniform(0.1, 1, size=len(terms)) + rng.normal(size=(40, 1)) * 0.3
    gram = d.T @ d / 80
    rows = [[float(x) for x in row[i:]] for i, row in enumerate(gram)]
    return Fisher(terms=terms, matrix=rows, stderr=[[0.0] * len(r) for r in rows], samples=1, sampling_error=0.1)


def predicted(fisher: Fisher, chosen) -> float:
    """The sum of the matrix over the ordered pairs of terms that count, written out."""
    counts = [i for i, term in enumerate(fisher.terms) if all(p in chosen for p in term)]
    return sum(fisher.matrix[min(i, j)][abs(i - j)] for i in counts for j in counts)


def test_the_kl_of_a_set_is_the_sum_over_its_terms():
    fisher = random_fisher(4, 0)
    model = Interactions.of_fisher(fisher)
    some = model.restricted([a(0), m(0), m(1), a(2), m(2)])
    for k in range(8):
        for chosen in itertools.combinations(range(7), k):
            expected = predicted(fisher, model.points_of(frozenset(chosen)))
            assert model.kl(frozenset(chosen)) == pytest.approx(expected)
    for k in range(6):
        for chosen in itertools.combinations(range(5), k):
            assert some.kl(frozenset(chosen)) == pytest.approx(predicted(fisher, some.points_of(frozenset(chosen))))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_with_swaps_finds_what_looking_at_every_set_finds(seed):
    model = Interactions.of_fisher(random_fisher(4, seed))
    for n, (greedy, exact) in enumerate(zip(model.greedy_front(), model.exact_front(), strict=True)):
        assert len(greedy) == len(exact) == n
        assert model.kl(exact) <= model.kl(greedy) + 1e-12 <= 1.02 * model.kl(exact) + 1e-9


def test_rivals_are_the_best_sets_of_the_same_size():
    model = Interactions.of_fisher(random_fisher(4, 7))
    best = model.front()[3]
    rivals = model.rivals(best, 5)
    assert rivals[0] == best and len(set(rivals)) == 5 and {len(s) for s in rivals} == {3}
    everything = sorted(model.kl(frozenset(s)) for s in itertools.combinations(range(7), 3))
    assert model.kl(rivals[1]) == pytest.approx(everything[1])


def fisher_profile(fisher: Fisher) -> Profile:
    p = make_profile([0.1] * (max(t[0].block for t in fisher.terms) + 1))
    return Profile.model_validate({**p.model_dump(), "method": "fisher", "measurements": [], "fisher": fisher})


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff"])
def test_a_profile_of_predictions_is_planned_from_in_any_unit(kind):
    fisher = random_fisher(4, 3)

    def world(factor):
        return lambda sets: [comparison(factor * predicted(fisher, set(drops))) for drops in sets]

    value = 1.0 if kind == "max_logprob_diff" else 0.2
    choice = choose(fisher_profile(fisher), budget(kind, value, [DROP]), world(1.3), world(1.5))
    assert budgets.kept(budget(kind, value), choice.verified) and choice.dropped
    assert choice.predicted_kl == pytest.approx(predicted(fisher, {c.point for c in choice.dropped}))


def test_predictions_know_kl_alone():
    p = fisher_profile(random_fisher(3, 0))
    assert p.strategies == [DROP] and p.sync_points == ["attention", "mlp"] and p.ranking(DROP) == p.ranking(DROP, "kl")
    with pytest.raises(InputError, match="KL alone"):
        p.sensitivity(DROP, "ppl")
    with pytest.raises(InputError, match="KL alone"):
        choose(p, budget("tau", 0.1, [DROP], tau2=1.0), total([0] * 3), total([0] * 3))


def test_what_is_measured_decides_between_the_best_few():
    """The profile knows no interactions; in the world, 0 and 1 together are dear."""
    costs = [0.01, 0.011, 0.012, 0.5]

    def world(sets):
        dear = {a(0), a(1)}
        return [comparison(sum(costs[p.block] for p in s) + (0.1 if dear <= set(s) else 0)) for s in sets]

    choice = choose(make_profile(costs), budget("drop", 2, [DROP]), world, world)
    assert {c.block for c in choice.dropped} == {0, 2}


@pytest.mark.parametrize("n", range(1, 8))
def test_a_plan_never_loses_against_what_anyone_would_try_first(n):
    fisher = random_fisher(4, 11)
    truth = random_fisher(4, 12)  # the profile is of no use at all

    def world(sets):
        return [comparison(predicted(truth, set(drops))) for drops in sets]

    p = fisher_profile(fisher)
    named = Obvious(candidates(p, budget(strategies=[DROP])), world)
    choice = choose(p, budget("drop", n, [DROP]), world, world, lambda k: list(named(k).values()))
    compared = named.compare(choice)
    assert len(compared) == 9 and all(len(set(points)) == n for points in named(n).values())
    assert compared["this plan"].kl == min(c.kl for c in compared.values())


def test_the_papers_order_is_by_what_each_block_adds_to_those_behind_it():
    points = [a(0), a(1), a(2)]
    assert paper_order(points, [comparison(0.7), comparison(0.4), comparison(0.35)]) == [a(1), a(0), a(2)]


def test_the_knee_is_where_it_starts_to_cost():
    assert knee([0, 0.01, 0.02, 0.04, 0.5, 1.0]) == 3
    assert knee([0, 1]) == 0 and knee([0]) == 0


def test_the_front_needs_no_measurement_and_shows_those_there_are():
    p = make_profile([0.05, 0.01, 0.02])
    front = front_of(p, None, p.provenance, {frozenset([a(1)]): comparison(0.015)})
    assert [x.predicted_kl for x in front.points] == pytest.approx([0, 0.01, 0.03, 0.08])
    assert [x.measured_kl for x in front.points] == [None, 0.015, None, None]
    assert front.points[2].dropped == [a(1), a(2)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_promises_hold_on_text_never_used_to_choose(family):
    """Ten random budgets a model, in every unit, from predictions alone."""
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    sequences = [tiny.tokens(1, 16, seed=n)[0].tolist() for n in range(16)]
    _, fisher = fisher_scores(lm, sequences[:8], ["attention", "mlp"], 0.3)
    p = fisher_profile(fisher)
    rng = np.random.default_rng(0)
    known: dict = {}

    def measured_on(text, name):
        def run(sets):
            new = [s for s in sets if (name, frozenset(s)) not in known]
            found = measure_sets(lm, new, text, 8, lambda i, tally: None)
            known.update(((name, frozenset(s)), m) for s, m in zip(new, found, strict=True))
            return [known[name, frozenset(s)] for s in sets]

        return run

    calibrate, verify = measured_on(sequences[:8], "calibration"), measured_on(sequences[8:], "held out")
    everything = calibrate([dict.fromkeys([p[0] for p in fisher.terms if len(p) == 1], DROP)])[0]
    kept_promises = 0
    for i in range(10):
        kind = ["max_kl", "max_logprob_diff", "max_kl", "max_ppl_increase", "max_accuracy_drop"][i % 5]
        value = abs(budgets.cost(budget(kind), everything))  # random text may even gain
        b = budget(kind, float(rng.uniform(0.05, 0.9)) * value, [DROP])
        try:
            choice = choose(p, b, calibrate, verify)
        except SpdError:  # nothing can be dropped within it: no promise was made
            continue
        assert budgets.kept(b, choice.verified)
        assert choice.verified == verify([{c.point: c.strategy for c in choice.dropped}])[0]
        kept_promises += 1
    assert kept_promises >= 5
