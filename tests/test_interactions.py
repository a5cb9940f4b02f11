"""The model of what sets cost, against sums written out, and its searches, against looking at every set."""

import itertools
import math
import random

import numpy as np
import pytest
from profiles import DROP, a, budget, comparison, m, make_profile, predicted, random_fisher, recovered

from spd_calib.formats.drops import Drops, Point
from spd_calib.formats.profile import Fisher
from spd_calib.planning import interactions
from spd_calib.planning.candidates import candidates, interactions_of
from spd_calib.planning.interactions import Interactions, follows


def of_singles(costs: dict[Point, float], base: float = 0.0) -> Interactions:
    return Interactions.of_singles(Drops.of(dict.fromkeys(costs, DROP)), costs, base=base)


def at(model: Interactions, chosen) -> list[Point]:
    """The points of these indices."""
    return [model.points[i] for i in sorted(chosen)]


def test_what_follows_what():
    order = [a(0), m(0), a(1), m(1), a(2)]
    for i, j in itertools.product(range(5), repeat=2):
        assert follows(order[i], order[j]) == (j == i + 1)


def test_singles_add_up_but_for_consecutive_ones():
    costs = {a(0): 0.04, m(0): 0.09, a(1): 0.16, a(2): 0.01}
    model = of_singles(costs, base=0.5)
    assert model.points == (a(0), m(0), a(1), a(2))
    alone = of_singles(costs)
    for n in range(5):
        for chosen in itertools.combinations(range(4), n):
            points = [model.points[i] for i in chosen]
            expected = sum(costs[p] for p in points)
            for first, second in ((a(0), m(0)), (m(0), a(1))):
                if first in points and second in points:
                    expected += 2 * math.sqrt(costs[first] * costs[second])
            assert model.kl(at(model, chosen)) == pytest.approx(0.5 + expected)
            assert alone.kl(at(alone, chosen)) == pytest.approx(expected)
    kept = model.restricted([m(0), a(2)])
    assert kept.points == (m(0), a(2)) and kept.kl(at(kept, [0, 1])) == pytest.approx(0.5 + 0.1)


def test_consecutive_sync_points_are_not_taken_for_independent():
    """Alone 0.02 each; the debts of two that follow each other add up, so their amplitudes do."""
    p = make_profile([0.02, 0.02, 0.02], mlp=[0.02, 0.02])
    model = interactions_of(p, candidates(p, budget(strategies=[DROP])))
    assert model.points == (a(0), m(0), a(1), m(1), a(2))
    assert model.kl(at(model, [0, 1])) == pytest.approx(0.08) and model.kl(at(model, [0, 2])) == pytest.approx(0.04)
    assert list(model.front()[3]) == [a(0), a(1), a(2)]


def test_two_consecutive_points_and_no_other():
    model = of_singles({a(0): 0.04, m(0): 0.09})
    assert model.kl(at(model, [0, 1])) == pytest.approx(0.04 + 0.09 + 2 * 0.06)


def test_interactions_leave_the_base_where_it_is():
    p = make_profile([0.1, 0.2]).model_copy(update={"recovered": recovered([m(0)], comparison(0.05))})
    assert interactions_of(p, candidates(p, budget(strategies=[DROP]))).kl([]) == 0.05


def test_the_kl_of_a_set_is_the_sum_over_its_terms():
    fisher = random_fisher(4, 0)
    model = Interactions.of_fisher(fisher)
    some = model.restricted([a(0), m(0), m(1), a(2), m(2)])
    for k in range(8):
        for chosen in itertools.combinations(range(7), k):
            expected = predicted(fisher, at(model, chosen))
            assert model.kl(at(model, chosen)) == pytest.approx(expected)
    for k in range(6):
        for chosen in itertools.combinations(range(5), k):
            assert some.kl(at(some, chosen)) == pytest.approx(predicted(fisher, at(some, chosen)))


def random_directions(blocks: int, seed: int) -> Fisher:
    """Scores of random directions, one a term: a matrix such as fisher.py measures."""
    points = [p for i in range(blocks) for p in ((a(i), m(i)) if i < blocks - 1 else (a(i),))]
    terms = [[p] for p in points] + [[p, q] for p, q in itertools.pairwise(points)]
    scores = np.random.default_rng(seed).normal(size=(len(terms), 3 * len(terms)))
    matrix = 0.5 * scores @ scores.T / scores.shape[1]
    n = len(terms)
    upper = [row[i:].tolist() for i, row in enumerate(matrix)]
    stderr = [[0.01] * (n - i) for i in range(n)]
    return Fisher(terms=terms, matrix=upper, stderr=stderr, samples=4, sampling_error=0.1)


def test_fisher_sets_equal_the_sum_over_pairs_of_terms():
    fisher = random_directions(3, 0)
    model = Interactions.of_fisher(fisher)
    terms = [tuple(t) for t in fisher.terms]
    for n in range(6):
        for chosen in itertools.combinations(range(5), n):
            points = {model.points[i] for i in chosen}
            counted = [i for i, t in enumerate(terms) if points.issuperset(t)]
            expected = sum(fisher.matrix[min(i, j)][abs(i - j)] for i in counted for j in counted)
            assert model.kl(at(model, chosen)) == pytest.approx(expected)


def test_terms_may_stand_in_any_order():
    fisher = random_directions(3, 5)
    n = len(fisher.terms)
    order = random.Random(1).sample(range(n), n)
    full = [[fisher.matrix[min(i, j)][abs(i - j)] for j in range(n)] for i in range(n)]
    mixed = fisher.model_copy(
        update={
            "terms": [fisher.terms[i] for i in order],
            "matrix": [[full[order[r]][order[c]] for c in range(r, n)] for r in range(n)],
        }
    )
    one, two = Interactions.of_fisher(fisher), Interactions.of_fisher(mixed)
    assert one.points == two.points
    for k in range(6):
        for s in itertools.combinations(range(5), k):
            assert one.kl(at(one, s)) == pytest.approx(two.kl(at(two, s)))


def test_fisher_of_the_attention_alone_has_no_pairs():
    fisher = random_directions(3, 5)
    only = [i for i, t in enumerate(fisher.terms) if len(t) == 1 and t[0].sync_point == "attention"]
    full = [[fisher.matrix[min(i, j)][abs(i - j)] for j in only] for i in only]
    alone = fisher.model_copy(
        update={"terms": [fisher.terms[i] for i in only], "matrix": [row[i:] for i, row in enumerate(full)]}
    )
    model = Interactions.of_fisher(alone)
    assert model.kl(at(model, [0, 1, 2])) == pytest.approx(sum(map(sum, full)))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_with_swaps_finds_what_looking_at_every_set_finds(seed):
    model = Interactions.of_fisher(random_fisher(4, seed))
    for n, (greedy, exact) in enumerate(zip(model.greedy_front(), model.exact_front(), strict=True)):
        assert len(greedy) == len(exact) == n
        assert model.kl(exact) <= model.kl(greedy) + 1e-12 <= 1.02 * model.kl(exact) + 1e-9


@pytest.mark.parametrize("n", [4, 12, 13])
def test_small_fronts_are_exact_and_large_ones_are_not_looked_at_whole(n, monkeypatch):
    model = of_singles({a(i): 0.1 * (1 + (5 * i) % 7) for i in range(n)})
    called = []
    for name in ("exact_front", "greedy_front"):
        monkeypatch.setattr(Interactions, name, lambda self, name=name: called.append(name) or [])
    model.front()
    assert called == ["exact_front" if n <= interactions.EXACT else "greedy_front"]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_fronts_and_rivals_of_interacting_sets(seed):
    """Against looking at every set."""
    model = Interactions.of_fisher(random_directions(4, seed))
    every = [sorted(map(model.drops.only, itertools.combinations(model.points, n)), key=model.kl) for n in range(8)]
    assert [model.kl(s) for s in model.exact_front()] == pytest.approx([model.kl(sets[0]) for sets in every])
    for n, chosen in enumerate(model.greedy_front()):
        assert len(chosen) == n and model.kl(chosen) <= model.kl(every[n][min(1, len(every[n]) - 1)]) + 1e-12
    rivals = model.rivals(every[3][0], count=5)
    assert rivals[0] == every[3][0] and len(set(rivals)) == 5 and all(len(s) == 3 for s in rivals)
    costs = [model.kl(s) for s in rivals]
    swapped = min(model.kl(s) for s in every[3] if len(set(s) & set(rivals[0])) == 2)
    assert costs == sorted(costs) and costs[1] <= swapped + 1e-12


def naive_down(model: Interactions) -> list[float]:
    """From all points: the cheapest one out, then swaps while any helps; KL of every size, the largest first."""
    chosen, found = frozenset(model.points), [model.kl(model.points)]
    while chosen:
        chosen = min((chosen - {i} for i in chosen), key=lambda s: (model.kl(s), sorted(s)))
        while True:
            swaps = [chosen - {i} | {j} for i in chosen for j in model.points if j not in chosen]
            best = min(swaps, key=model.kl, default=chosen)
            if model.kl(best) >= model.kl(chosen):
                break
            chosen = best
        found.append(model.kl(chosen))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_greedy_front_is_no_dearer_than_a_naive_way_down(seed):
    """On matrices of a few directions, where drops can cancel each other."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(13, 3))
    matrix = np.zeros((14, 14))
    matrix[:13, :13] = 0.5 * scores @ scores.T
    model = Interactions(Drops.of({a(i): DROP for i in range(13)}), matrix, np.full(13, 13))
    found = [model.kl(s) for s in model.greedy_front()]
    assert all(f <= n + 1e-12 for f, n in zip(found, reversed(naive_down(model)), strict=True))


def test_rivals_are_the_best_sets_of_the_same_size():
    model = Interactions.of_fisher(random_fisher(4, 7))
    best = model.front()[3]
    rivals = model.rivals(best, count=5)
    assert rivals[0] == best and len(set(rivals)) == 5 and {len(s) for s in rivals} == {3}
    everything = sorted(model.kl(at(model, s)) for s in itertools.combinations(range(7), 3))
    assert model.kl(rivals[1]) == pytest.approx(everything[1])


@pytest.mark.parametrize("seed", range(4))
def test_rivals_are_the_cheapest_within_two_swaps(seed):
    model = Interactions.of_fisher(random_directions(4, seed))
    best, count = model.drops.only(at(model, [0, 2, 5])), 5

    def swaps(chosen):
        others = [j for j in model.points if j not in chosen]
        return [model.drops.only({*chosen} - {i} | {j}) for i in chosen for j in others]

    starts = [best, *sorted(swaps(best), key=model.kl)[:2]]
    near = {s for start in starts for s in swaps(start)} - {best}
    assert model.rivals(best, count=count) == [best, *sorted(near, key=model.kl)[: count - 1]]


@pytest.mark.parametrize("blocks", [3, 5])
def test_additions_are_the_kl_of_the_larger_sets(blocks):
    model = Interactions.of_fisher(random_directions(blocks, 3))
    model = Interactions(model.drops, model.matrix, model.pair, base=0.7)
    for chosen in [frozenset(), frozenset([0]), frozenset([1, 2]), frozenset([0, 2, 4])]:
        found = model._additions(chosen)
        for j in model._all:
            expected = math.inf if j in chosen else model.kl(at(model, chosen | {j}))
            assert found[j] == pytest.approx(expected)


@pytest.mark.parametrize("unit", [1.0, 1e-13, 1e9])
def test_swaps_go_on_until_none_is_cheaper(unit):
    model = of_singles({a(i): unit * kl for i, kl in enumerate([0.3, 0.1, 0.5, 0.2])})
    assert model._swapped(frozenset([0])) == {1}
    assert model._swapped(frozenset([0, 2])) == {1, 3}
    assert model._swapped(frozenset([1, 3])) == {1, 3}
    level = of_singles({a(i): unit for i in range(4)})
    assert level._swapped(frozenset([2])) == {2}  # as cheap is not cheaper
