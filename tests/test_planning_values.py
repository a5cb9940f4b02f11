"""Planning by hand: what budgets spend and say, the search's corner cases, sentences with their way out."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_planning import DROP, PLAIN, a, budget, comparison, m, make_profile, total

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import Provenance, Strategy
from spd_calib.formats.profile import Fisher, Recovered
from spd_calib.planning import budget as budgets
from spd_calib.planning import interactions
from spd_calib.planning.front import front_of, knee
from spd_calib.planning.interactions import Interactions, follows
from spd_calib.planning.latency import predictor_weights
from spd_calib.planning.obvious import back_to_front_sets, obvious_sets, paper_order
from spd_calib.planning.search import Search, candidates, choose, interactions_of, tier

MEASURED = comparison(0.25).model_copy(
    update={
        "kl_stderr": 0.01, "ppl_increase": 0.5, "nll_increase_stderr": 0.02, "accuracy_drop": 0.125,
        "accuracy_drop_stderr": 0.03, "max_abs_logprob_diff": 7.0,
        "task_accuracy_drop": {"x": 0.25, "y": 0.75}, "task_accuracy_drop_stderr": {"x": 0.03, "y": 0.04},
    }
)  # fmt: skip
PROVENANCE = Provenance(command="c", seed=0, device="cpu", dtype="float32", versions={})


def recovered(settled, alone) -> Recovered:
    return Recovered(recovered_from=make_profile([1]).model, plan_sha256="2" * 64, settled=settled, alone=alone)


@pytest.mark.parametrize(
    ("kind", "spent", "error", "words"),
    [
        ("max_kl", 0.25, 0.01, "KL 0.125"),
        ("max_ppl_increase", 0.5, 1.5 * 0.02, "perplexity +12.5 %"),
        ("max_accuracy_drop", 0.125, 0.03, "accuracy -12.5 points"),
        ("max_logprob_diff", 7.0, 0.0, "max |delta log p| 0.125"),
        ("min_speedup", 0.25, 0.01, "a step 12.5 % shorter"),
        ("drop", 0.25, 0.01, "0 sync points dropped"),
        ("tau", 0.25, 0.01, "tau1 0.125, tau2 0"),
    ],
)
def test_what_a_plan_spends_of_each_budget(kind, spent, error, words):
    b = budget(kind, 0.125)
    assert budgets.cost(b, MEASURED) == spent and budgets.stderr(b, MEASURED) == pytest.approx(error)
    assert budgets.describe(b) == words and budgets.describe(budget(kind, 3), 0.125) == words
    by_construction = kind in ("drop", "tau")
    assert budgets.kept(budget(kind, spent), MEASURED) and budgets.kept(budget(kind, 0), MEASURED) == by_construction
    enough = spent + 2 * error
    assert budgets.kept(budget(kind, enough + 1e-9), MEASURED, certain=True)
    assert budgets.kept(budget(kind, enough - 1e-9), MEASURED, certain=True) == by_construction


def test_a_budget_of_tasks_is_their_average():
    b = budget("max_accuracy_drop", 0.1, tasks=["x", "y"])
    assert budgets.cost(b, MEASURED) == 0.5 and budgets.stderr(b, MEASURED) == pytest.approx(0.025)
    assert budgets.describe(b) == "accuracy -10 points on x, y"
    assert budgets.describe(budget("tau", 0.5, tau2=0.75)) == "tau1 0.5, tau2 0.75"


def test_shares_and_numbers_of_blocks_say_what_is_wrong():
    assert budgets.blocks("50%", 4) == 2 and budgets.blocks("100%", 4) == 4 and budgets.blocks("4", 4) == 4
    assert budgets.fraction("100%", "--x") == 1 and budgets.fraction("2", "--x") == 2
    for text, words in (
        ("101%", "--drop 101% asks for more than the 4 blocks there are; ask for fewer."),
        ("5", "--drop 5 asks for more than the 4 blocks there are; ask for fewer."),
        ("x%", "--drop 'x%' is no budget; write a number such as 0.01, or 1%."),
        ("few", "--drop 'few' is no number of blocks; write one such as 5, or a share such as 60%."),
    ):
        with pytest.raises(InputError) as e:
            budgets.blocks(text, 4)
        assert str(e.value) == words
    for text in ("inf", "-1%", "nan"):
        with pytest.raises(InputError, match="--max-kl"):
            budgets.fraction(text, "--max-kl")


def test_why_each_sync_point_is_dropped_that_way():
    p = make_profile([0.010, 0.020], [0.012, 0.080], mlp=[0.005])
    found = {c.point: c for c in candidates(p, budget())}
    assert {point: c.reason for point, c in found.items()} == {
        a(0): "plain drop measures no worse than block drop",
        a(1): "plain drop would cost KL 0.08",
        m(0): "its sync joins the next one kept",
    }
    assert found[a(0)].kl == 0.012 and found[a(1)].kl == 0.020 and found[m(0)].kl == 0.005
    alone = candidates(p, budget(strategies=[PLAIN]))
    assert [(c.point, c.kl, c.reason) for c in alone] == [
        (a(0), 0.012, "the only strategy allowed"), (a(1), 0.080, "the only strategy allowed")
    ]  # fmt: skip
    assert {c.point for c in candidates(p, budget("tau", tau2=1))} == {a(0), a(1)}


def test_candidates_say_what_was_not_profiled():
    p = make_profile([0.01], [0.02])
    only_mlp = p.model_copy(update={"measurements": make_profile([9, 9], mlp=[0.3]).measurements[2:]})
    assert [c.point for c in candidates(only_mlp, budget(strategies=[DROP]))] == [m(0)]
    for profile, strategies, words in (
        (make_profile([0.01]), [DROP, PLAIN],
         "The profile holds no measurement of plain_drop; profile again with --strategy plain_drop."),
        (only_mlp, [PLAIN],
         "The profile holds no measurement of plain_drop; profile again with --strategy plain_drop."),
        (p.model_copy(update={"measurements": list(p.of(PLAIN).values())}), [DROP],
         "The profile holds no measurement of block_drop; profile again with --strategy block_drop."),
        (p, [Strategy.KEEP_SYNC],
         "--strategy keep_sync alone leaves nothing to plan; allow block_drop or plain_drop."),
    ):  # fmt: skip
        with pytest.raises(InputError) as e:
            candidates(profile, budget(strategies=strategies))
        assert str(e.value) == words


def test_each_budget_ranks_by_its_own_metric():
    """Three blocks whose order differs by KL, by perplexity and by accuracy."""
    p = make_profile([0.1, 0.2, 0.3])
    rows = [
        r.model_copy(update={"ppl": ppl, "accuracy_drop": lost})
        for r, ppl, lost in zip(p.measurements, (12, 11, 13), (0.03, 0.02, 0.01), strict=True)
    ]

    def order(kind, rank_by="kl"):
        changed = p.model_copy(update={"measurements": rows, "rank_by": rank_by})
        return [c.block for c in candidates(changed, budget(kind, strategies=[DROP]))]

    assert order("max_kl") == order("max_logprob_diff", "ppl") == [0, 1, 2]
    assert order("max_ppl_increase") == order("tau") == [1, 0, 2]
    assert order("max_accuracy_drop") == [2, 1, 0]
    assert order("drop", "accuracy") == [2, 1, 0] and order("drop", "ppl") == [1, 0, 2]


def test_mlps_are_ranked_by_their_own_measurements():
    p = make_profile([0.3, 0.1], mlp=[0.2])
    assert [c.point for c in candidates(p, budget(strategies=[DROP]))] == [a(1), m(0), a(0)]


def test_a_number_of_drops_of_a_recovered_checkpoint_counts_those_it_has():
    p = make_profile([0.1, 0.3, 0.2]).model_copy(update={"recovered": recovered([m(0)], comparison(0.05))})
    costs = [0.1, 0.3, 0.2]
    choice = choose(p, budget("drop", 3, [DROP]), total(costs), total(costs))
    assert [c.block for c in choice.dropped] == [0, 2] and choice.repaired == 0
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
        choice = choose(profile, budget("drop", 1, [DROP]), total(costs), total(costs))
        assert [c.block for c in choice.dropped] == expected and choice.verified.kl > 0


def test_nothing_fits_says_what_the_best_would_cost():
    def impossible(profile, b, costs):
        with pytest.raises(SpdError) as e:
            choose(profile, b, total(costs), total(costs))
        return str(e.value)

    words = impossible(make_profile([0.5, 0.25]), budget(value=0.125, strategies=[DROP]), [0.5, 0.25])
    assert words == (
        "No sync point can be dropped within KL 0.125: the best plan found, block 1 alone with block_drop, costs "
        "KL 0.25 on held-out text; raise --max-kl."
    )
    p = make_profile([0.5, 0.25], mlp=[0.2]).model_copy(update={"recovered": recovered([a(1)], comparison(0.01))})
    rows = [r for r in p.measurements if not (r.block == 1 and r.sync_point == "attention")]
    words = impossible(
        p.model_copy(update={"measurements": rows}),
        budget("max_ppl_increase", 0.01, [DROP]),
        {0: 0.5},
    )
    assert words.startswith("No further sync point can be dropped within perplexity +1 %: ")
    assert "--max-ppl-increase" in words and "block 0's MLP alone" in words


def counted(costs, factor=1.0):
    """`total`, and a list of the sizes of the sets it was asked for."""
    asked = []

    def measure(sets):
        asked.extend(len(drops) for drops in sets)
        return total(costs, factor)(sets)

    return measure, asked


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase"])
@pytest.mark.parametrize("limit", [0.02, 0.05, 0.11, 0.17, 0.23, 0.3, 0.5])
def test_the_largest_number_that_fits_is_found_for_any_budget(kind, limit):
    costs = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    fits = max(n for n in range(8) if sum(costs[:n]) * 1.0 + 2 * 0.001 * (1 + sum(costs[:n])) <= limit)
    measure, asked = counted(costs)
    choice = choose(make_profile(costs), budget(kind, limit, [DROP]), measure, total(costs))
    assert [c.block for c in choice.dropped] == list(range(fits)) and choice.repaired == 0
    assert max(asked) <= 7


def test_a_prediction_far_off_is_mended_by_bisection():
    """Sets cost five times their sum: the model of the profile would take far too many."""
    costs = [0.01] * 8
    choice = choose(make_profile(costs), budget(value=0.16, strategies=[DROP]), total(costs, 5), total(costs, 5))
    assert len(choice.dropped) == 3
    cheaper = choose(make_profile(costs), budget(value=0.0121, strategies=[DROP]), total(costs, 0.2), total(costs, 0.2))
    assert len(cheaper.dropped) == 5


def test_repairs_take_as_much_back_as_the_other_text_asks_for():
    """Held-out text costs twice as much: of six, three fit; every size between is not tried one by one."""
    costs = [0.01] * 6
    measure, verified = counted(costs, 2)
    choice = choose(make_profile(costs), budget(value=0.063, strategies=[DROP]), total(costs), measure)
    assert (len(choice.dropped), choice.repaired) == (3, 3) and verified == [6, 3]


def test_tiers_hold_at_their_bounds():
    p = make_profile([0.125, 0.25, 0.5])  # perplexity 11.25, 12.5 and 15, from 10
    b = budget("tau", 1.25, [DROP], tau2=2.5)
    assert [tier(p, b, c) for c in candidates(p, b)] == ["insensitive", "sensitive", "extremely sensitive"]
    none = budget("tau", 1.25, [DROP])
    assert [tier(p, none, c) for c in candidates(p, none)] == ["insensitive", *["extremely sensitive"] * 2]


def test_the_few_sets_of_a_size_hold_the_ranking_and_the_best_without_mlps():
    p = make_profile([0.3, 0.1, 0.4], mlp=[0.05, 0.2])
    search = Search(p, budget(strategies=[DROP]), total([1, 1, 1]))
    found = [frozenset(search.model.points_of(s)) for s in search.few(2)]
    assert frozenset([a(0), a(1)]) in found and frozenset([m(0), a(1)]) in found and len(found) == len(set(found))
    assert all(len(s) == 2 for s in found)
    assert {frozenset(pair) for pair in itertools.combinations([a(0), a(1), a(2)], 2)} <= set(found)
    assert [len(s) for s in search.rankings] == [0, 1, 2, 3, 4, 5]
    assert all(m(0) in search.model.points_of(s) or m(1) in search.model.points_of(s) for s in search.few(4))
    without = Search(make_profile([0.3, 0.1]), budget(strategies=[DROP]), total([1, 1]))
    assert len(without.few(1)) == 2


def by_point(costs):
    """Sets cost the sum of their sync points', MLPs by their own."""
    return lambda sets: [comparison(sum(costs[p] for p in drops)) for drops in sets]


@pytest.mark.parametrize(("mlp", "taken"), [(0.0967, a(0)), (0.0991, a(0)), (0.0966, m(0)), (0.05, m(0)), (0.2, a(0))])
def test_an_mlp_is_dropped_only_where_that_is_two_standard_errors_cheaper(mlp, taken):
    """Both measure with an error of 0.001: 0.0995 against what is 0.00283 or more below it."""
    costs = {a(0): 0.0995, a(1): 0.5, m(0): mlp}
    p = make_profile([0.0995, 0.5], mlp=[mlp])
    choice = choose(p, budget("drop", 1, [DROP]), by_point(costs), by_point(costs))
    assert [c.point for c in choice.dropped] == [taken]


def test_an_mlp_is_dropped_where_only_that_keeps_the_budget():
    costs = {a(0): 0.0995, a(1): 0.5, m(0): 0.099}
    choice = choose(make_profile([0.0995, 0.5], mlp=[0.099]), budget(value=0.1012, strategies=[DROP]), by_point(costs),
                    by_point(costs))  # fmt: skip
    assert [c.point for c in choice.dropped] == [m(0)]


def test_where_held_out_text_breaks_a_set_without_mlps_the_cheapest_of_its_size_is_tried():
    """On the calibration text attention 0 is as good; on the other it breaks the budget, MLP 0 does not."""
    p = make_profile([0.041, 0.5], mlp=[0.040])
    calibrated, held_out = {a(0): 0.041, a(1): 0.5, m(0): 0.040}, {a(0): 0.052, a(1): 0.5, m(0): 0.038}
    choice = choose(p, budget(value=0.05, strategies=[DROP]), by_point(calibrated), by_point(held_out))
    assert [c.point for c in choice.dropped] == [m(0)] and choice.repaired == 0


def test_on_each_text_the_error_is_that_of_the_dearest_one():
    """The other text is cheap and noisy: its error says nothing of the dearest."""
    parts = [comparison(0.1), comparison(0.01).model_copy(update={"kl_stderr": 0.02})]
    both = comparison(0.055).model_copy(update={"per_text": parts, "kl_stderr": 0.01})
    assert budgets.stderr(budget(each_text=True), both) == 0.001 and budgets.stderr(budget(), both) == 0.01


def test_a_plan_over_both_kinds_measures_all_that_one_over_the_attention_does():
    """The profile misjudges which pair of attentions is cheap; what either planner finds is measured by both."""
    truth = {a(i): kl for i, kl in enumerate([0.03, 0.04, 0.05, 0.01, 0.02])} | {m(i): 0.5 for i in range(4)}
    single = [0.01, 0.02, 0.03, 0.04, 0.05]
    for n in range(1, 6):
        plans = [
            choose(make_profile(single, mlp=mlp), budget("drop", n, [DROP]), by_point(truth), by_point(truth))
            for mlp in ([0.001] * 4, [])
        ]
        assert plans[0].verified.kl <= plans[1].verified.kl


def test_what_follows_what():
    order = [a(0), m(0), a(1), m(1), a(2)]
    for i, j in itertools.product(range(5), repeat=2):
        assert follows(order[i], order[j]) == (j == i + 1)


def test_singles_add_up_but_for_consecutive_ones():
    costs = {a(0): 0.04, m(0): 0.09, a(1): 0.16, a(2): 0.01}
    model = Interactions.of_singles(costs, 0.5)
    assert model.points == (a(0), m(0), a(1), a(2))
    alone = Interactions.of_singles(costs)
    for n in range(5):
        for chosen in itertools.combinations(range(4), n):
            points = [model.points[i] for i in chosen]
            expected = sum(costs[p] for p in points)
            for first, second in ((a(0), m(0)), (m(0), a(1))):
                if first in points and second in points:
                    expected += 2 * math.sqrt(costs[first] * costs[second])
            assert model.kl(frozenset(chosen)) == pytest.approx(0.5 + expected)
            assert alone.kl(frozenset(chosen)) == pytest.approx(expected)
    kept = model.restricted([m(0), a(2)])
    assert kept.points == (m(0), a(2)) and kept.kl(frozenset([0, 1])) == pytest.approx(0.5 + 0.1)


def random_fisher(blocks: int, seed: int) -> Fisher:
    """Scores of random directions, one a term: a matrix such as fisher.py measures."""
    points = [p for i in range(blocks) for p in ((a(i), m(i)) if i < blocks - 1 else (a(i),))]
    terms = [[p] for p in points] + [[p, q] for p, q in itertools.pairwise(points)]
    scores = np.random.default_rng(seed).normal(size=(len(terms), 3 * len(terms)))
    matrix = 0.5 * scores @ scores.T / scores.shape[1]
    n = len(terms)
    upper = [row[i:].tolist() for i, row in enumerate(matrix)]
    stderr = [[0.01] * (n - i) for i in range(n)]
    return Fisher(terms=terms, matrix=upper, stderr=stderr, samples=4, sampling_error=0.1)


def test_interactions_leave_the_base_where_it_is():
    p = make_profile([0.1, 0.2]).model_copy(update={"recovered": recovered([m(0)], comparison(0.05))})
    assert interactions_of(p, candidates(p, budget(strategies=[DROP]))).kl(frozenset()) == 0.05


@pytest.mark.parametrize("n", [4, 12, 13])
def test_small_fronts_are_exact_and_large_ones_are_not_looked_at_whole(n, monkeypatch):
    model = Interactions.of_singles({a(i): 0.1 * (1 + (5 * i) % 7) for i in range(n)})
    called = []
    for name in ("exact_front", "greedy_front"):
        monkeypatch.setattr(Interactions, name, lambda self, name=name: called.append(name) or [])
    model.front()
    assert called == ["exact_front" if n <= interactions.EXACT else "greedy_front"]


def test_knees():
    assert knee([0.0, 0.0, 0.0, 1.0]) == 2
    assert knee([1.0, 1.0, 1.0, 9.0]) == 2
    assert knee([0.0, 0.5, 0.5, 1.0, 8.0]) == 3
    assert knee([3.0]) == 0 and knee([0.0, 1.0]) == 0


def test_the_front_says_which_strategy_it_does_not_know():
    with pytest.raises(InputError) as e:
        front_of(make_profile([0.1]), ["block_drop", "drop_all"], PROVENANCE, {})
    assert str(e.value) == "--strategy 'drop_all' is none of keep_sync, block_drop, plain_drop."
    assert [p.drops for p in front_of(make_profile([0.1, 0.2]), ["block_drop"], PROVENANCE, {}).points] == [0, 1, 2]


def test_the_obvious_sets_by_name():
    points = [a(2), m(0), a(0), m(1), a(1), a(3)]
    found = obvious_sets(points, 2, [a(1), a(3), a(0), a(2)])
    assert list(found) == [
        "the paper's back-to-front order", "the last", "evenly spaced", *(f"random, seed {i}" for i in range(5))
    ]  # fmt: skip
    assert found["the paper's back-to-front order"] == [a(1), a(3)]
    assert found["the last"] == [a(3), a(2)]
    assert found["evenly spaced"] == [a(1), a(3)]
    assert obvious_sets(points, 4, [])["evenly spaced"] == [a(0), a(1), a(2), a(3)]
    more = obvious_sets(points, 5, [a(1), a(3), a(0), a(2)])
    assert more["the paper's back-to-front order"] == [a(1), a(3), a(0), a(2), m(1)]
    assert more["the last"] == [a(3), a(2), a(1), a(0), m(1)]
    assert more["evenly spaced"] == [a(0), m(0), m(1), a(2), a(3)]
    assert all(len(set(chosen)) == 2 for name, chosen in found.items() if name.startswith("random"))


def test_the_papers_order_and_its_sets():
    points = [a(0), a(1), a(2)]
    equal = [comparison(kl) for kl in (0.3, 0.2, 0.1)]
    assert paper_order(points, equal) == points  # equal shares: in the order of the blocks
    assert paper_order(points, [comparison(kl) for kl in (0.6, 0.5, 0.2)]) == [a(0), a(2), a(1)]
    with pytest.raises(ValueError, match="zip"):
        paper_order(points[:2], equal)
    assert [list(s) for s in back_to_front_sets(points, dict.fromkeys(points, DROP))] == [
        points,
        points[1:],
        points[2:],
    ]


def test_fisher_sets_equal_the_sum_over_pairs_of_terms():
    fisher = random_fisher(3, 0)
    model = Interactions.of_fisher(fisher)
    terms = [tuple(t) for t in fisher.terms]
    for n in range(6):
        for chosen in itertools.combinations(range(5), n):
            points = {model.points[i] for i in chosen}
            counted = [i for i, t in enumerate(terms) if points.issuperset(t)]
            expected = sum(fisher.matrix[min(i, j)][abs(i - j)] for i in counted for j in counted)
            assert model.kl(frozenset(chosen)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_fronts_and_rivals_of_interacting_sets(seed):
    """Against looking at every set."""
    model = Interactions.of_fisher(random_fisher(4, seed))
    every = [sorted(map(frozenset, itertools.combinations(range(7), n)), key=model.kl) for n in range(8)]
    assert [model.kl(s) for s in model.exact_front()] == pytest.approx([model.kl(sets[0]) for sets in every])
    for n, chosen in enumerate(model.greedy_front()):
        assert len(chosen) == n and model.kl(chosen) <= model.kl(every[n][min(1, len(every[n]) - 1)]) + 1e-12
    rivals = model.rivals(every[3][0], 5)
    assert rivals[0] == every[3][0] and len(set(rivals)) == 5 and all(len(s) == 3 for s in rivals)
    costs = [model.kl(s) for s in rivals]
    swapped = min(model.kl(s) for s in every[3] if len(s & rivals[0]) == 2)
    assert costs == sorted(costs) and costs[1] <= swapped + 1e-12


def test_a_budget_on_each_text_is_the_costliest_texts():
    b = budget("max_kl", 0.25, each_text=True)
    texts = [comparison(kl).model_copy(update={"kl_stderr": error}) for kl, error in ((0.25, 0.0), (0.125, 0.1))]
    both = comparison(0.1875).model_copy(update={"per_text": texts})
    assert budgets.cost(b, both) == 0.25 and budgets.describe(b) == "on each text, KL 0.25"
    assert budgets.kept(b, both) and not budgets.kept(b, both, certain=True), "the second text's error is too large"
    assert not budgets.kept(b.model_copy(update={"value": 0.2}), both)
    sure = both.model_copy(update={"per_text": [t.model_copy(update={"kl_stderr": 0.0}) for t in texts]})
    assert budgets.kept(b, sure, certain=True)


def test_the_weights_of_predictors_counted_one_by_one():
    """Width 5, 4 heads of 3 over 2 ranks: a rank's head outputs are 6 values; a mean, rank 2, a full one."""
    shape = SimpleNamespace(counts=SimpleNamespace(heads=4, head_dim=3), width=5)
    forms = [("mean", 0), ("low_rank", 2), ("full", 0), None]
    blocks = [SimpleNamespace(compensation=f and SimpleNamespace(kind=f[0], rank=f[1])) for f in forms]
    plan = SimpleNamespace(tensor_parallel=SimpleNamespace(size=2), blocks=blocks)
    assert predictor_weights(plan, shape) == 5 + (6 * 2 + 2 * 5 + 5) + (6 * 5 + 5)


@pytest.mark.parametrize("sequences", [2, 3, 4, 8, 29])
def test_with_few_sequences_the_margin_is_students(sequences):
    """The same doubt as 2 standard errors of a normal value leave: found by bisection, on the t distribution's CDF."""
    from scipy import integrate, special

    degrees = sequences - 1
    scale = math.exp(special.gammaln((degrees + 1) / 2) - special.gammaln(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    above = 0.5 - integrate.quad(density, 0, budgets.margin(sequences), limit=500)[0]
    assert above == pytest.approx(math.erfc(2 / math.sqrt(2)) / 2, abs=1e-9)


def test_the_margin_of_many_and_of_one():
    assert budgets.margin(30) == budgets.margin(10**6) == 2 and budgets.margin(1) == math.inf
    assert 2 < budgets.margin(29) < budgets.margin(8) < budgets.margin(2) < math.inf


def test_what_is_spared_is_by_the_fewest_sequences_of_a_text_and_infinite_without_an_error():
    few = comparison(0.1).model_copy(update={"sequences": 5, "kl_stderr": 0.03})
    many = comparison(0.2).model_copy(update={"sequences": 500, "kl_stderr": 0.04})
    both = comparison(0.15).model_copy(update={"per_text": [many, few], "sequences": 505, "kl_stderr": 0.025})
    b = budget("max_kl", 1.0)
    assert budgets.spare(b, few, many) == pytest.approx(budgets.margin(5) * 0.05)
    assert budgets.spare(b, both) == pytest.approx(budgets.margin(5) * 0.025)
    one = few.model_copy(update={"sequences": 1, "kl_stderr": None, "nll_increase_stderr": None})
    assert budgets.spare(b, one) == budgets.spare(b, many, one) == math.inf
    assert budgets.kept(b, one) and not budgets.kept(b, one, certain=True)
    assert budgets.stderr(budget("max_ppl_increase", 1.0), one) is None
    assert budgets.spare(budget("max_logprob_diff", 1.0), one) == 0
    with_tasks = MEASURED.model_copy(update={"sequences": 5})
    assert budgets.spare(budget("max_accuracy_drop", 1.0, tasks=["x", "y"]), with_tasks) == pytest.approx(2 * 0.025)


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff", "drop", "tau"])
def test_a_bound_wants_enough_sequences_of_every_text(kind):
    whole = make_profile([0.01, 0.02])
    b = budget(kind, 0.5, tau2=0.7 if kind == "tau" else None)
    budgets.check_enough_text(b, whole)
    for field, fewest, option in (("text", 4, "--max-samples"), ("verify_text", 2, "--verify-samples")):
        ref = getattr(whole, field)
        parts = [ref, ref.model_copy(update={"sequences": fewest - 1, "source": "short"})]
        for few in (parts[1], ref.model_copy(update={"parts": parts})):
            profile = whole.model_copy(update={field: few})
            enough = few.model_copy(update={"sequences": fewest, "parts": []})
            budgets.check_enough_text(b, whole.model_copy(update={field: enough}))
            if kind in ("max_logprob_diff", "drop", "tau"):
                budgets.check_enough_text(b, profile)
                continue
            with pytest.raises(InputError, match=f"wants {fewest} sequences to .*short has {fewest - 1}; .*{option}"):
                budgets.check_enough_text(b, profile)
