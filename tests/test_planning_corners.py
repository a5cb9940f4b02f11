"""Corners of planning/ against naive forms of the same: swaps, additions, knees, measured steps, sets not measured."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_latency import hardware, machine, timing
from test_plan_file import COSTS, asked, made  # noqa: F401
from test_planning import DROP, a, budget, comparison, m, make_profile, total
from test_planning_values import by_point, random_fisher

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import dumps
from spd_calib.formats.hardware import Collective
from spd_calib.formats.hardware import Step as Timed
from spd_calib.planning import latency
from spd_calib.planning import plan as planning
from spd_calib.planning.front import knee
from spd_calib.planning.interactions import Interactions
from spd_calib.planning.latency import LatencyModel, Shape, Step
from spd_calib.planning.obvious import obvious_sets
from spd_calib.planning.search import Search, _smaller, choose


def test_knees_lie_farthest_below_the_line():
    dice = random.Random(0)
    for _ in range(200):
        costs = [dice.uniform(0, 3)]
        for _ in range(dice.randrange(1, 9)):
            costs.append(costs[-1] + dice.uniform(0, 1) ** 3)
        last = len(costs) - 1
        below = [costs[0] * (1 - i / last) + costs[-1] * i / last - c for i, c in enumerate(costs)]
        assert below[knee(costs)] == pytest.approx(max(below))
    assert knee([1.0, 0.0]) == 0


def test_two_consecutive_points_and_no_other():
    model = Interactions.of_singles({a(0): 0.04, m(0): 0.09})
    assert model.kl(frozenset([0, 1])) == pytest.approx(0.04 + 0.09 + 2 * 0.06)


@pytest.mark.parametrize("blocks", [3, 5])
def test_additions_are_the_kl_of_the_larger_sets(blocks):
    model = Interactions.of_fisher(random_fisher(blocks, 3))
    model = Interactions(model.points, model.matrix, model.pair, base=0.7)
    for chosen in [frozenset(), frozenset([0]), frozenset([1, 2]), frozenset([0, 2, 4])]:
        found = model._additions(chosen)
        for j in model._all:
            expected = math.inf if j in chosen else model.kl(chosen | {j})
            assert found[j] == pytest.approx(expected)


@pytest.mark.parametrize("unit", [1.0, 1e-13, 1e9])
def test_swaps_go_on_until_none_is_cheaper(unit):
    model = Interactions.of_singles({a(i): unit * kl for i, kl in enumerate([0.3, 0.1, 0.5, 0.2])})
    assert model._swapped(frozenset([0])) == {1}
    assert model._swapped(frozenset([0, 2])) == {1, 3}
    assert model._swapped(frozenset([1, 3])) == {1, 3}
    level = Interactions.of_singles({a(i): unit for i in range(4)})
    assert level._swapped(frozenset([2])) == {2}  # as cheap is not cheaper


def naive_down(model: Interactions) -> list[float]:
    """From all points: the cheapest one out, then swaps while any helps; KL of every size, the largest first."""
    chosen, found = frozenset(model._all), [model.kl(frozenset(model._all))]
    while chosen:
        chosen = min((chosen - {i} for i in chosen), key=lambda s: (model.kl(s), sorted(s)))
        while True:
            swaps = [chosen - {i} | {j} for i in chosen for j in model._all if j not in chosen]
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
    model = Interactions(tuple(a(i) for i in range(13)), matrix, np.full(13, 13))
    found = [model.kl(s) for s in model.greedy_front()]
    assert all(f <= n + 1e-12 for f, n in zip(found, reversed(naive_down(model)), strict=True))


def test_random_sets_are_the_same_every_time():
    points = [a(i) for i in range(9)]
    assert obvious_sets(points, 3, points) == obvious_sets(points, 3, points)
    assert len({tuple(obvious_sets(points, 3, points)[f"random, seed {s}"]) for s in range(5)}) == 5


def test_sets_not_measured_on_the_way_are_measured_for_the_comparison(asked):  # noqa: F811
    """The paper's thresholds measure nothing on the calibration text; sets that were are not measured again."""
    p = make_profile([0.4, 0.1, 0.05])
    plan, choice, compared = made(budget("tau", 1.25, [DROP]), p, compare=True)
    assert plan.dropped == [1, 2] and choice.measured == {}
    names = planning.Obvious(planning.candidates(p, budget("tau", 1.25, [DROP])), lambda sets: asked)
    names.order = [a(2), a(1), a(0)]
    for name, points in {"this plan": [a(1), a(2)], **names(2)}.items():
        assert compared[name].kl == pytest.approx(sum(COSTS[q] for q in points)), name
    known = {frozenset([a(1), a(2)]): comparison(0.15)}
    before, choice = len(asked), SimpleNamespace(dropped=choice.dropped, measured=known)
    called: list = []
    again = planning.Obvious(planning.candidates(p, budget(strategies=[DROP])), lambda sets: called.append(sets) or
                             total([0.4, 0.1, 0.05])(sets))  # fmt: skip
    found = again.compare(choice)
    assert found["this plan"] is known[frozenset([a(1), a(2)])] and len(asked) == before
    assert all(set(s) != {a(1), a(2)} for s in called[-1])


def test_compare_offers_the_obvious_sets_to_the_choice(asked):  # noqa: F811
    """An obvious set that measures best is taken, though the profile thinks nothing of it."""
    p = make_profile([0.4, 0.1, 0.05, *[0.06] * 9])
    cheap = dict.fromkeys(range(12), 1.0) | {10: 0.001, 11: 0.001}
    choice = choose(p, budget("drop", 2, [DROP]), total(cheap), total(cheap), lambda n: [[a(10), a(11)]])
    assert [c.block for c in choice.dropped] == [10, 11]


def test_predictions_of_fisher_are_kl_alone():
    fisher = random_fisher(3, 1)
    p = make_profile([0.1]).model_copy(update={"fisher": fisher, "measurements": [], "method": "fisher"})
    predicted = planning._predicted(p, SimpleNamespace(predicted_kl=0.125, dropped=[]))
    assert (predicted.kl, predicted.ppl_increase, predicted.accuracy_drop) == (0.125, None, None)


def test_a_budget_of_tasks_sees_the_set_it_is_about(monkeypatch):
    set_as = []
    lm = SimpleNamespace(
        num_blocks=2, set_strategies=lambda *s: set_as.append(s), keep_all=lambda: set_as.append("kept")
    )
    found = planning._with_tasks(lm, lambda: ({"t": 0.25}, {"t": 0.01}), {a(1): DROP, m(0): DROP}, comparison(0.1))
    assert found.task_accuracy_drop == {"t": 0.25} and found.task_accuracy_drop_stderr == {"t": 0.01}
    assert set_as == [(("keep_sync", "block_drop"), ("block_drop", "keep_sync")), "kept"]


@pytest.mark.parametrize(
    ("measured", "verified", "value", "n"),
    [
        ({3: 0.3, 2: 0.2, 1: 0.1}, 0.6, 0.41, 2),  # twice as much: 0.4 of two fit
        ({3: 0.3, 2: 0.2, 1: 0.1}, 0.6, 0.4, 2),  # exactly
        ({3: 0.3, 2: 0.2, 1: 0.1}, 0.6, 0.2, 1),
        ({3: 0.3}, 0.6, 0.41, 2),  # by the model: two thirds
        ({3: 0.0, 2: 0.2}, 0.6, 0.41, 2),  # nothing on the calibration text tells no ratio
        ({3: 0.3, 2: 0.2, 1: 0.1}, 0.6, 0.1, 1),  # none fits: the smallest is tried all the same
    ],
)
def test_how_many_to_try_next(measured, verified, value, n):
    search = Search(make_profile([0.1] * 3), budget(value=value, strategies=[DROP]), total([0.1] * 3))
    search.measured = {search.front[k]: comparison(kl) for k, kl in measured.items()}
    assert _smaller(search, budget(value=value, strategies=[DROP]), search.front[3], comparison(verified)) == n


def test_of_a_model_that_predicts_nothing_the_first_smaller_set_is_tried():
    search = Search(make_profile([0.0] * 3), budget(value=0.1, strategies=[DROP]), total([0.0] * 3))
    assert _smaller(search, budget(value=0.1, strategies=[DROP]), search.front[3], comparison(0.6)) == 2


def test_more_drops_than_there_are_save_nothing_more():
    model = LatencyModel("m", Step("decode", 1, 1, 2), blocks=5, compute=7.0, all_reduce=0.3)
    assert model.drops_for(0.15, 5) == 5
    with pytest.raises(SpdError, match="beyond what can be saved"):
        model.drops_for(0.16, 5)


def of_prefill(shape: Shape, seconds: float, batch: int = 2, tokens: int = 8):
    """Measured prefill steps; an all-reduce takes 1 us a byte."""
    rows = [Collective(method="all_reduce", ranks=2, bytes=b, seconds=timing(1e-6 * b)) for b in (1, 10**9)]
    steps = [
        Timed(phase="prefill", blocks="dense", dropped=0, batch=batch, tokens=tokens, seconds=timing(seconds)),
        Timed(phase="prefill", blocks="every_block_dropped", dropped=shape.blocks, batch=batch, tokens=tokens,
              seconds=timing(seconds / 2)),
        Timed(phase="decode", blocks="every_block_dropped", dropped=shape.blocks, batch=1, tokens=8,
              seconds=timing(77.0)),
    ]  # fmt: skip
    return hardware(shape, 1.0, 0.9).model_copy(update={"collectives": rows, "steps": steps})


def test_a_measured_prefill_step_is_of_all_its_tokens():
    shape = Shape.of(tiny.build("llama"))
    one = 1e-6 * 2 * 8 * shape.width * 4
    measured = of_prefill(shape, 1.0)
    model = latency.as_measured(measured, shape, "prefill", "bench.json", 50)
    compute = 1.0 - 2 * shape.blocks * one
    assert model.hardware == "bench.json" and model.step == Step("prefill", 2, 8, 4)
    assert model.all_reduce == pytest.approx(one) and model.compute == pytest.approx(compute)
    work = latency.flops(shape, 2, model.step)
    assert model.predictors == pytest.approx(compute * 2 * 16 * 50 / work)
    predicted, seen = latency.held_against(measured, model)["every_block_dropped"]
    assert seen == 0.5 and predicted == pytest.approx(1.0 - shape.blocks * one + model.predictors)
    with pytest.raises(InputError) as e:
        latency.as_measured(of_prefill(shape, 2 * shape.blocks * model.all_reduce), shape, "prefill", "bench.json")
    assert f"shorter than its {2 * shape.blocks} all-reduces timed alone" in str(e.value)


def test_what_can_be_given_as_hardware(tmp_path):
    shape = Shape.of(tiny.build("llama"))
    measured = hardware(shape, 1.0, 0.9)
    file = tmp_path / "bench.json"
    file.write_text(dumps(measured))
    assert latency.load(str(file)) == measured
    file.rename(tmp_path / "bench.txt")
    assert latency.load(str(tmp_path / "bench.txt")) == measured  # whatever it is called
    with pytest.raises(InputError, match=r"bench\.json"):
        latency.load(str(file))
    with pytest.raises(InputError, match=r"--hardware nothing is no file and none of a100-nvlink, a100-nvlink-nccl, "):
        latency.load("nothing")
    table = tmp_path / "größe.csv"
    table.write_bytes(f"{','.join(latency.COLUMNS)}\r\n4,1024,1e-5,1e10,1e11\r\n".encode())
    assert latency.load(str(table)).name == "größe"
    table.write_text("ranks\n4\n")
    with pytest.raises(InputError, match="needs the columns ranks, bytes, seconds, "):
        latency.load(str(table))


def test_a_table_of_other_ranks_names_the_way_out():
    with pytest.raises(InputError) as e:
        latency.on_machine(machine(2), Shape.of(tiny.build("llama")), 4, Step("decode", 1, 1, 2))
    assert str(e.value) == (
        "m holds all-reduce times of 2 ranks, not of 4, and how a link scales is not guessed; measure yours with "
        "`spd-calib bench`, or give a CSV of them."
    )


def test_terms_may_stand_in_any_order():
    fisher = random_fisher(3, 5)
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
            assert one.kl(frozenset(s)) == pytest.approx(two.kl(frozenset(s)))


def test_fisher_of_the_attention_alone_has_no_pairs():
    fisher = random_fisher(3, 5)
    only = [i for i, t in enumerate(fisher.terms) if len(t) == 1 and t[0].sync_point == "attention"]
    full = [[fisher.matrix[min(i, j)][abs(i - j)] for j in only] for i in only]
    alone = fisher.model_copy(
        update={"terms": [fisher.terms[i] for i in only], "matrix": [row[i:] for i, row in enumerate(full)]}
    )
    model = Interactions.of_fisher(alone)
    assert model.kl(frozenset([0, 1, 2])) == pytest.approx(sum(map(sum, full)))


@pytest.mark.parametrize("seed", range(4))
def test_rivals_are_the_cheapest_within_two_swaps(seed):
    model = Interactions.of_fisher(random_fisher(4, seed))
    best, count = frozenset([0, 2, 5]), 5

    def swaps(chosen):
        return [chosen - {i} | {j} for i in chosen for j in model._all if j not in chosen]

    starts = [best, *sorted(swaps(best), key=model.kl)[:2]]
    near = {s for start in starts for s in swaps(start)} - {best}
    assert model.rivals(best, count) == [best, *sorted(near, key=model.kl)[: count - 1]]


@pytest.mark.parametrize(
    ("costs", "n", "taken"),
    [
        ({a(0): 0.0995, a(1): 0.099, m(0): 0.0985}, 1, [a(1)]),  # the cheapest of those without MLPs
        ({a(0): 0.05, a(1): 0.05, m(0): 0.0495}, 2, [a(0), a(1)]),  # all that there are without MLPs
    ],
)
def test_which_sets_without_mlps_stand_against_those_with(costs, n, taken):
    p = make_profile([costs[a(0)], costs[a(1)]], mlp=[costs[m(0)]])
    choice = choose(p, budget("drop", n, [DROP]), by_point(costs), by_point(costs))
    assert sorted((c.point for c in choice.dropped), key=lambda q: q.block) == taken


def test_where_the_profile_is_wrong_about_one_block_all_others_still_go():
    """The block that it thinks cheapest breaks every set of the front; rivals without it are found size by size."""
    truth = {a(0): 1.0, a(1): 0.01, a(2): 0.01}
    p = make_profile([0.01, 0.011, 0.012])
    choice = choose(p, budget(value=0.045, strategies=[DROP]), by_point(truth), by_point(truth))
    assert sorted(c.block for c in choice.dropped) == [1, 2] and choice.repaired == 0


def test_accuracy_without_tasks_ranks_but_does_not_decide():
    """Next-token accuracy says block 0 is harmless; measured whole, block 1 is."""
    p = make_profile([0.2, 0.1], rank_by="accuracy")
    rows = [r.model_copy(update={"accuracy_drop": lost}) for r, lost in zip(p.measurements, (0.0, 0.1), strict=True)]
    p = p.model_copy(update={"measurements": rows})
    choice = choose(p, budget("drop", 1, [DROP]), total([0.2, 0.1]), total([0.2, 0.1]))
    assert [c.block for c in choice.dropped] == [1]


def test_with_compare_an_obvious_set_that_measures_best_is_the_plan(monkeypatch):
    """The last two blocks cost nothing, whatever the profile says of them alone."""
    truth = {a(i): 0.1 for i in range(10)} | {a(10): 0.001, a(11): 0.001}

    def measured(lm, sets, *more):
        return [comparison(sum(truth[p] for p in drops)) for drops in sets]

    monkeypatch.setattr(planning, "measure_sets", measured)
    lm = SimpleNamespace(module_paths=[f"layers.{i}" for i in range(12)], num_blocks=12)
    p = make_profile([0.1 + 0.01 * i for i in range(12)])
    for compare, dropped in ((True, [10, 11]), (False, [0, 1])):
        held_out = planning.HeldOutText([[[1, 2]]], p.verify_text)
        plan, _, _ = planning.make_plan(  # type: ignore[arg-type]
            lm, p, budget("drop", 2, [DROP]), [[[1, 2]]], held_out, p.provenance, compare=compare
        )
        assert plan.dropped == dropped


def test_where_nothing_fits_the_cheapest_is_named_whatever_it_drops():
    """On the calibration text both single drops keep the budget, on the other neither does."""
    calibrated, held_out = {a(0): 0.041, a(1): 0.5, m(0): 0.040}, {a(0): 0.052, a(1): 0.5, m(0): 0.06}
    p = make_profile([0.041, 0.5], mlp=[0.040])
    with pytest.raises(SpdError, match=r"block 0's MLP alone with block_drop, costs KL 0\.06 on held-out text"):
        choose(p, budget(value=0.05, strategies=[DROP]), by_point(calibrated), by_point(held_out))
