"""The search, on profiles made by hand and measurements that are functions."""

import itertools

import numpy as np
import pytest
import tiny
from profiles import (
    DROP,
    a,
    budget,
    by_point,
    chosen,
    comparison,
    fisher_profile,
    m,
    make_profile,
    predicted,
    random_fisher,
    recovered,
    total,
)

from spd_calib.errors import SpdError
from spd_calib.formats.drops import Drops
from spd_calib.formats.plan import Budget
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.planning import budget as budgets
from spd_calib.planning.candidates import candidates, tier
from spd_calib.planning.search import Search, choose
from spd_calib.planning.whole_plans import Calibration, measure_plans
from spd_calib.sensitivity.fisher import predict
from spd_calib.sensitivity.measure import Subject


def counted(costs, factor=1.0):
    """`total`, and a list of the sizes of the sets it was asked for."""
    asked = []

    def measure(sets):
        asked.extend(len(drops) for drops in sets)
        return total(costs, factor)(sets)

    return measure, asked


def test_the_longest_run_that_keeps_the_budget_is_found():
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    p = make_profile(costs)
    choice = chosen(p, budget(value=0.103, strategies=[DROP]), total(costs), total(costs))
    assert choice.drops.blocks("attention") == [1, 2, 3, 4]
    assert choice.verified.kl == pytest.approx(0.1) and choice.given_back == 0


def test_the_calibration_text_must_keep_the_budget_with_two_standard_errors_to_spare():
    """0.1 with an error of 0.001: a budget of 0.102 is kept for sure, one of 0.1019 is not."""
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    for value, n in ((0.1021, 4), (0.1019, 3)):
        choice = chosen(make_profile(costs), budget(value=value, strategies=[DROP]), total(costs), total(costs))
        assert len(choice.drops) == n and choice.given_back == 0
    m = comparison(0.05)
    assert budgets.stderr(Budget(kind="max_ppl_increase", value=1, strategies=[DROP]), m) == pytest.approx(1.05 * 0.001)
    one = chosen(make_profile([0.05]), budget(value=0.051, strategies=[DROP]), total([0.05]), total([0.05]))
    assert one.drops.blocks("attention") == [0]  # too close to say; the held-out text decides


def test_sets_that_cost_more_than_their_sum_are_measured_not_believed():
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    choice = chosen(make_profile(costs), budget(value=0.1, strategies=[DROP]), total(costs, 1.5), total(costs, 1.5))
    assert choice.drops.blocks("attention") == [1, 2, 4]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("value", [0.02, 0.05, 0.11, 0.2, 0.6, 9.0])
def test_no_longer_run_would_have_kept_the_budget(value, factor):
    costs = [0.05, 0.01, 0.02, 0.04, 0.03, 0.08, 0.1, 0.015]
    world = total(costs, factor)
    order = sorted(range(8), key=lambda b: costs[b])
    try:
        n = len(chosen(make_profile(costs), budget(value=value, strategies=[DROP]), world, world).drops)
    except SpdError:
        n = 0
    fits = [k for k in range(9) if world([map(a, order[:k])])[0].kl <= value]
    assert n == max(fits)


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase"])
@pytest.mark.parametrize("limit", [0.02, 0.05, 0.11, 0.17, 0.23, 0.3, 0.5])
def test_the_largest_number_that_fits_is_found_for_any_budget(kind, limit):
    costs = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    fits = max(n for n in range(8) if sum(costs[:n]) * 1.0 + 2 * 0.001 * (1 + sum(costs[:n])) <= limit)
    measure, asked = counted(costs)
    choice = chosen(make_profile(costs), budget(kind, limit, [DROP]), measure, total(costs))
    assert choice.drops.blocks("attention") == list(range(fits)) and choice.given_back == 0
    assert max(asked) <= 7


def test_a_prediction_far_off_is_mended_by_bisection():
    """Sets cost five times their sum: the model of the profile would take far too many."""
    costs = [0.01] * 8
    choice = chosen(make_profile(costs), budget(value=0.16, strategies=[DROP]), total(costs, 5), total(costs, 5))
    assert len(choice.drops) == 3
    cheaper = chosen(make_profile(costs), budget(value=0.0121, strategies=[DROP]), total(costs, 0.2), total(costs, 0.2))
    assert len(cheaper.drops) == 5


def test_where_the_profile_is_wrong_about_one_block_all_others_still_go():
    """The block that it thinks cheapest breaks every set of the front; rivals without it are found size by size."""
    truth = {a(0): 1.0, a(1): 0.01, a(2): 0.01}
    p = make_profile([0.01, 0.011, 0.012])
    choice = chosen(p, budget(value=0.045, strategies=[DROP]), by_point(truth), by_point(truth))
    assert choice.drops.blocks("attention") == [1, 2] and choice.given_back == 0


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff"])
def test_a_profile_of_predictions_is_planned_from_in_any_unit(kind):
    fisher = random_fisher(4, 3)

    def world(factor):
        return lambda sets: [comparison(factor * predicted(fisher, set(drops))) for drops in sets]

    value = 1.0 if kind == "max_logprob_diff" else 0.2
    choice = chosen(fisher_profile(fisher), budget(kind, value, [DROP]), world(1.3), world(1.5))
    assert budgets.kept(budget(kind, value), choice.verified) and choice.drops
    assert choice.predicted_kl == pytest.approx(predicted(fisher, set(choice.drops)))


def test_what_is_measured_decides_between_the_best_few():
    """The profile knows no interactions; in the world, 0 and 1 together are dear."""
    costs = [0.01, 0.011, 0.012, 0.5]

    def world(sets):
        dear = {a(0), a(1)}
        return [comparison(sum(costs[p.block] for p in s) + (0.1 if dear <= set(s) else 0)) for s in sets]

    choice = chosen(make_profile(costs), budget("drop", 2, [DROP]), world, world)
    assert choice.drops.blocks("attention") == [0, 2]


def test_the_few_sets_of_a_size_hold_the_ranking_and_the_best_without_mlps():
    p = make_profile([0.3, 0.1, 0.4], mlp=[0.05, 0.2])
    search = Search(p, budget(strategies=[DROP]), calibration=Calibration(total([1, 1, 1])))
    found = [frozenset(drops) for drops in search.few(2)]
    assert frozenset([a(0), a(1)]) in found and frozenset([m(0), a(1)]) in found and len(found) == len(set(found))
    assert all(len(s) == 2 for s in found)
    assert {frozenset(pair) for pair in itertools.combinations([a(0), a(1), a(2)], 2)} <= set(found)
    assert [len(s) for s in search.ranking] == [0, 1, 2, 3, 4, 5]
    assert all(m(0) in drops or m(1) in drops for drops in search.few(4))
    without = Search(make_profile([0.3, 0.1]), budget(strategies=[DROP]), calibration=Calibration(total([1, 1])))
    assert len(without.few(1)) == 2


def test_a_plan_over_both_kinds_measures_all_that_one_over_the_attention_does():
    """The profile misjudges which pair of attentions is cheap; what either planner finds is measured by both."""
    truth = {a(i): kl for i, kl in enumerate([0.03, 0.04, 0.05, 0.01, 0.02])} | {m(i): 0.5 for i in range(4)}
    single = [0.01, 0.02, 0.03, 0.04, 0.05]
    for n in range(1, 6):
        plans = [
            chosen(make_profile(single, mlp=mlp), budget("drop", n, [DROP]), by_point(truth), by_point(truth))
            for mlp in ([0.001] * 4, [])
        ]
        assert plans[0].verified.kl <= plans[1].verified.kl


def test_a_number_of_drops_takes_the_least_sensitive():
    costs = [0.05, 0.01, 0.02]
    choice = chosen(make_profile(costs), budget("drop", 2, [DROP]), total(costs), total(costs))
    assert choice.drops.blocks("attention") == [1, 2]


def test_a_number_of_drops_of_a_recovered_checkpoint_counts_those_it_has():
    p = make_profile([0.1, 0.3, 0.2]).model_copy(update={"recovered": recovered([m(0)], comparison(0.05))})
    costs = [0.1, 0.3, 0.2]
    choice = chosen(p, budget("drop", 3, [DROP]), total(costs), total(costs))
    assert choice.drops.blocks("attention") == [0, 2] and choice.given_back == 0
    assert choice.verified.kl == pytest.approx(0.3)


def test_tasks_decide_which_sets_a_number_of_drops_takes():
    """Ranked by lm-eval accuracy, what is measured on the text does not change the order."""
    p = make_profile([0.1, 0.2, 0.3], rank_by="accuracy")
    rows = [
        r.model_copy(update={"task_accuracy_drop": {"t": lost}})
        for r, lost in zip(p.measurements, (0.3, 0.2, 0.1), strict=True)
    ]
    ranked = p.model_copy(update={"measurements": rows})
    costs = [0.1, 0.2, 0.3]
    for profile, expected in ((ranked, [2]), (p, [0]), (ranked.model_copy(update={"rank_by": "kl"}), [0])):
        choice = chosen(profile, budget("drop", 1, [DROP]), total(costs), total(costs))
        assert choice.drops.blocks("attention") == expected and choice.verified.kl > 0


def test_accuracy_without_tasks_ranks_but_does_not_decide():
    """Next-token accuracy says block 0 is harmless; measured whole, block 1 is."""
    p = make_profile([0.2, 0.1], rank_by="accuracy")
    rows = [r.model_copy(update={"accuracy_drop": lost}) for r, lost in zip(p.measurements, (0.0, 0.1), strict=True)]
    p = p.model_copy(update={"measurements": rows})
    choice = chosen(p, budget("drop", 1, [DROP]), total([0.2, 0.1]), total([0.2, 0.1]))
    assert choice.drops.blocks("attention") == [1]


def test_the_papers_thresholds_make_three_tiers():
    p = make_profile([0.001, 0.03, 0.2])  # 0.01, 0.3 and 2 points of perplexity
    b = budget("tau", 0.1, [DROP], tau2=1.0)
    found = {c.point.block: tier(p, b, c) for c in candidates(p, b)}
    assert found == {0: "insensitive", 1: "sensitive", 2: "extremely sensitive"}
    assert chosen(p, b, total([0] * 3), total([0] * 3)).drops.blocks("attention") == [0]


@pytest.mark.parametrize(("mlp", "taken"), [(0.0967, a(0)), (0.0991, a(0)), (0.0966, m(0)), (0.05, m(0)), (0.2, a(0))])
def test_an_mlp_is_dropped_only_where_that_is_two_standard_errors_cheaper(mlp, taken):
    """Both measure with an error of 0.001: 0.0995 against what is 0.00283 or more below it."""
    costs = {a(0): 0.0995, a(1): 0.5, m(0): mlp}
    p = make_profile([0.0995, 0.5], mlp=[mlp])
    choice = chosen(p, budget("drop", 1, [DROP]), by_point(costs), by_point(costs))
    assert list(choice.drops) == [taken]


def test_an_mlp_is_dropped_where_only_that_keeps_the_budget():
    costs = {a(0): 0.0995, a(1): 0.5, m(0): 0.099}
    choice = chosen(make_profile([0.0995, 0.5], mlp=[0.099]), budget(value=0.1012, strategies=[DROP]), by_point(costs),
                    by_point(costs))  # fmt: skip
    assert list(choice.drops) == [m(0)]


@pytest.mark.parametrize(
    ("costs", "n", "taken"),
    [
        ({a(0): 0.0995, a(1): 0.099, m(0): 0.0985}, 1, [a(1)]),  # the cheapest of those without MLPs
        ({a(0): 0.05, a(1): 0.05, m(0): 0.0495}, 2, [a(0), a(1)]),  # all that there are without MLPs
    ],
)
def test_which_sets_without_mlps_stand_against_those_with(costs, n, taken):
    p = make_profile([costs[a(0)], costs[a(1)]], mlp=[costs[m(0)]])
    choice = chosen(p, budget("drop", n, [DROP]), by_point(costs), by_point(costs))
    assert list(choice.drops) == taken


def test_a_budget_broken_on_held_out_text_is_repaired():
    costs = [0.05, 0.01, 0.02, 0.04, 0.03]
    choice = chosen(make_profile(costs), budget(value=0.103, strategies=[DROP]), total(costs), total(costs, 2.0))
    assert choice.drops.blocks("attention") == [1, 2]
    assert choice.verified.kl <= 0.103 and choice.given_back == 2


def test_text_that_showed_a_budget_broken_is_used_up():
    """Verified twice: the set that was broken, and, on the next round of text, what is left of it."""
    costs, told = [0.05, 0.01, 0.02, 0.04, 0.03], []

    def verify(drops, used_up):
        told.append((len(drops), used_up))
        return total(costs, 1.5 if used_up else 2.0)([drops])[0]

    def choice(value):
        told.clear()
        b = budget(value=value, strategies=[DROP])
        return choose(make_profile(costs), b, calibration=Calibration(total(costs)), verify=verify)

    found = choice(0.103)
    assert found.verified.kl == pytest.approx(0.045) and told == [(4, 0), (2, 1)] and found.rounds == 1
    choice(0.203)
    assert told == [(5, 0), (4, 1)]
    with pytest.raises(SpdError):
        choice(0.014)
    assert told == [(1, 0)]  # nothing is left to verify on other text


def test_repairs_take_as_much_back_as_the_other_text_asks_for():
    """Held-out text costs twice as much: of six, three fit; every size between is not tried one by one."""
    costs = [0.01] * 6
    measure, verified = counted(costs, 2)
    choice = chosen(make_profile(costs), budget(value=0.063, strategies=[DROP]), total(costs), measure)
    assert (len(choice.drops), choice.given_back) == (3, 3) and verified == [6, 3]


def test_where_held_out_text_breaks_a_set_without_mlps_the_cheapest_of_its_size_is_tried():
    """On the calibration text attention 0 is as good; on the other it breaks the budget, MLP 0 does not."""
    p = make_profile([0.041, 0.5], mlp=[0.040])
    calibrated, held_out = {a(0): 0.041, a(1): 0.5, m(0): 0.040}, {a(0): 0.052, a(1): 0.5, m(0): 0.038}
    choice = chosen(p, budget(value=0.05, strategies=[DROP]), by_point(calibrated), by_point(held_out))
    assert list(choice.drops) == [m(0)] and choice.given_back == 0


@pytest.mark.parametrize(
    ("single", "verified", "value", "n"),
    [
        (0.1, 0.6, 0.41, 2),  # twice as much as by the model: 0.4 of two fit
        (0.1, 0.6, 0.4, 2),  # exactly
        (0.1, 0.6, 0.2, 1),
        (0.1, 0.6, 0.1, 1),  # none fits: the smallest is tried all the same
        (0.0, 0.6, 0.1, 2),  # a model that predicts nothing
    ],
)
def test_how_many_to_try_next(single, verified, value, n):
    search = Search(
        make_profile([single] * 3),
        budget(value=value, strategies=[DROP]),
        calibration=Calibration(total([single] * 3)),
    )
    assert len(search.next_choice(search.front[3], comparison(verified))) == n


def raced(costs, whole, part):
    """A calibration of a world in which sets cost the sum of `costs`; `whole` and `part` list the sets it measures."""
    world = by_point(costs)

    def on_whole(sets):
        whole.extend(sets)
        return world(sets)

    def on_part(sets):
        part.extend(sets)
        return world(sets)

    return Calibration(on_whole, race=on_part)


def test_only_the_best_of_a_race_are_measured_on_the_whole_text():
    """Of 30 blocks, the profile 1.5 times too cheap: a few sizes of the front, and two sets each of the last sizes."""
    costs = {a(i): 0.001 * (i + 1) for i in range(30)}
    p = make_profile([kl / 1.5 for kl in costs.values()])
    for value, n in ((0.0951, 13), (0.0185, 5), (0.4301, 28)):
        whole, part = [], []
        calibration = raced(costs, whole, part)
        choice = choose(
            p,
            budget(value=value, strategies=[DROP]),
            calibration=calibration,
            verify=lambda drops, used_up: by_point(costs)([drops])[0],
        )
        assert choice.drops.blocks("attention") == list(range(n)) and choice.given_back == 0
        assert len(whole) == len(set(whole)) <= 6 and len(part) == len(set(part)) <= 12


def test_the_sizes_measured_begin_where_the_model_says():
    """10 by the model; each costs half as much again: then 6, or 7 with nothing to spare."""
    costs, whole = {a(i): 0.015 for i in range(30)}, []
    search = Search(
        make_profile([0.01] * 30),
        budget(value=0.1021, strategies=[DROP]),
        calibration=raced(costs, whole, []),
    )
    assert search._bisect() == 6
    assert [len(drops) for drops in whole[:2]] == [10, 6]


def test_from_the_fourth_size_on_halves_are_measured():
    """Up to 19 sync points cost next to nothing, 20 far too much: every expectation goes to the nearest end."""
    asked = []

    def cliff(sets):
        asked.extend(len(drops) for drops in sets)
        return [comparison(1e-4 * len(drops) if len(drops) < 20 else 50.0) for drops in sets]

    p = make_profile([0.01] * 30)
    search = Search(p, budget(value=0.1021, strategies=[DROP]), calibration=Calibration(cliff))
    assert search._bisect() == 19
    assert asked[:3] == [10, 30, 11] and 18 <= asked[3] <= 22 and len(asked) <= 8


def test_an_expectation_that_is_just_the_budget_keeps_it():
    for kind, value in (("max_kl", 0.25), ("max_logprob_diff", 0.5)):  # the second goes as the root of KL
        search = Search(
            make_profile([0.25, 4.0]), budget(kind, value, [DROP]), calibration=Calibration(total([0.25, 4.0]))
        )
        assert search._expected(search.front[1]) == value
        assert search._expected_size(1.0) == 1 and search._expected_size(1.01) == 0


@pytest.mark.parametrize(("value", "n"), [(0.07, 1), (0.09, 2)])
def test_smaller_sets_are_judged_in_the_budgets_own_unit(value, n):
    """Accuracy lost, by hand: two of three lose 0.04 of 0.05 on the calibration text, so 0.08 of 0.1 on the other.

    By KL, which goes as their number, two would lose 0.067.
    """
    lost = [0.0, 0.01, 0.04, 0.05]

    def measure(sets):
        return [comparison(0.1 * len(drops), accuracy_drop=lost[len(drops)]) for drops in sets]

    b = budget("max_accuracy_drop", value, [DROP])
    search = Search(make_profile([0.1] * 3), b, calibration=Calibration(measure))
    assert len(search.next_choice(search.front[3], comparison(0.6, accuracy_drop=0.1))) == n


def test_of_the_sets_without_mlps_one_is_measured_on_the_whole():
    """Two sets with MLPs are cheapest; of the six pairs of attentions the cheapest is measured beside them."""
    costs = {a(i): 0.1 + 0.01 * i for i in range(4)} | {m(i): 0.01 * (i + 1) for i in range(3)}
    whole: list = []
    p = make_profile([costs[a(i)] for i in range(4)], mlp=[costs[m(i)] for i in range(3)])
    search = Search(p, budget(strategies=[DROP]), calibration=raced(costs, whole, []))
    assert search.finalists(2) == whole and len(whole) == 3
    assert [drops.requires_mlp_drop for drops in whole] == [True, True, False] and set(whole[2]) == {a(0), a(1)}


def test_what_part_of_the_text_rules_out_is_not_measured_on_the_whole():
    """Two standard errors of 0.001 above the budget on part of the text; at less it is measured, and found too dear."""
    for dear, value, measured in ((0.0531, 0.051, {1}), (0.0529, 0.051, {1, 2}), (0.053, 0.053 - 0.002, {1, 2})):
        costs, whole = {a(0): 0.0, a(1): dear, a(2): dear, a(3): dear}, []
        search = Search(
            make_profile([0.01, 0.02, 0.03, 0.04]),
            budget(value=value, strategies=[DROP]),
            calibration=raced(costs, whole, []),
        )
        search._bisect = lambda: 1
        assert search.largest_kept().blocks("attention") == [0]
        assert {len(drops) for drops in whole} == measured


def test_a_budget_that_cannot_be_met_names_the_best_plan_found():
    costs = [0.05, 0.01]
    with pytest.raises(SpdError, match=r"block 1 alone with block_drop, costs KL 0.02 .*raise `max_kl`") as e:
        chosen(make_profile(costs), budget(value=0.005, strategies=[DROP]), total(costs), total(costs, 2.0))
    assert e.value.exit_code == 1


def test_nothing_fits_says_what_the_best_would_cost():
    def impossible(profile, b, costs):
        with pytest.raises(SpdError) as e:
            chosen(profile, b, total(costs), total(costs))
        return str(e.value)

    words = impossible(make_profile([0.5, 0.25]), budget(value=0.125, strategies=[DROP]), [0.5, 0.25])
    assert words == (
        "No sync point can be dropped within KL 0.125: the best plan found, block 1 alone with block_drop, costs "
        "KL 0.25 on held-out text; raise `max_kl`."
    )
    p = make_profile([0.5, 0.25], mlp=[0.2]).model_copy(update={"recovered": recovered([a(1)], comparison(0.01))})
    rows = [r for r in p.measurements if not (r.block == 1 and r.sync_point == "attention")]
    words = impossible(
        p.model_copy(update={"measurements": rows}),
        budget("max_ppl_increase", 0.01, [DROP]),
        {0: 0.5},
    )
    assert words.startswith("No further sync point can be dropped within perplexity +1 %: ")
    assert "raise `max_ppl_increase`" in words and "block 0's MLP alone" in words


def test_where_nothing_fits_the_cheapest_is_named_whatever_it_drops():
    """On the calibration text both single drops keep the budget, on the other neither does."""
    calibrated, held_out = {a(0): 0.041, a(1): 0.5, m(0): 0.040}, {a(0): 0.052, a(1): 0.5, m(0): 0.06}
    p = make_profile([0.041, 0.5], mlp=[0.040])
    with pytest.raises(SpdError, match=r"block 0's MLP alone with block_drop, costs KL 0\.06 on held-out text"):
        chosen(p, budget(value=0.05, strategies=[DROP]), by_point(calibrated), by_point(held_out))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_promises_hold_on_text_never_used_to_choose(family):
    """Ten random budgets a model, in every unit, from predictions alone."""
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    sequences = [tiny.tokens(1, 16, seed=n)[0].tolist() for n in range(16)]
    _, fisher = predict(lm, sequences[:8], sync_points=["attention", "mlp"], target_stderr=0.3)
    p, known = fisher_profile(fisher), {}

    def measured_on(text, name):
        def run(sets):
            new = [s for s in sets if (name, s) not in known]
            found = measure_plans(new, [text], subject=Subject(lm))
            known.update(((name, s), m) for s, m in zip(new, found, strict=True))
            return [known[name, s] for s in sets]

        return run

    rng = np.random.default_rng(0)
    calibrate, verify = measured_on(sequences[:8], "calibration"), measured_on(sequences[8:], "held out")
    everything = calibrate([Drops.of({p[0]: DROP for p in fisher.terms if len(p) == 1})])[0]
    kept_promises = 0
    for i in range(10):
        kind = ["max_kl", "max_logprob_diff", "max_kl", "max_ppl_increase", "max_accuracy_drop"][i % 5]
        value = abs(budgets.cost(budget(kind), everything))  # random text may even gain
        b = budget(kind, float(rng.uniform(0.05, 0.9)) * value, [DROP])
        try:
            choice = chosen(p, b, calibrate, verify)
        except SpdError:  # nothing can be dropped within it: no promise was made
            continue
        assert budgets.kept(b, choice.verified)
        assert choice.verified == verify([choice.drops])[0]
        kept_promises += 1
    assert kept_promises >= 5
