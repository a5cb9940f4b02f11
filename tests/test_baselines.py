"""The baseline sets that a plan is held against."""

from types import SimpleNamespace

import pytest
from profiles import (
    DROP,
    a,
    budget,
    chosen,
    comparison,
    fisher_profile,
    m,
    make_profile,
    predicted,
    random_fisher,
    total,
)

from spd_calib.formats.drops import Drops
from spd_calib.planning.baselines import Baselines, back_to_front, baseline_sets, paper_order
from spd_calib.planning.candidates import candidates, drops_of
from spd_calib.planning.search import choose
from spd_calib.planning.whole_plans import Calibration


def test_the_baseline_sets_by_name():
    drops = Drops.of(dict.fromkeys([a(2), m(0), a(0), m(1), a(1), a(3)], DROP))
    found = baseline_sets(drops, 2, paper_order=[a(1), a(3), a(0), a(2)])
    assert list(found) == [
        "the paper's back-to-front order", "the last", "evenly spaced", *(f"random, seed {i}" for i in range(5))
    ]  # fmt: skip
    assert list(found["the paper's back-to-front order"]) == [a(1), a(3)]
    assert list(found["the last"]) == [a(2), a(3)]
    assert list(found["evenly spaced"]) == [a(1), a(3)]
    assert list(baseline_sets(drops, 4, paper_order=[])["evenly spaced"]) == [a(0), a(1), a(2), a(3)]
    more = baseline_sets(drops, 5, paper_order=[a(1), a(3), a(0), a(2)])
    assert list(more["the paper's back-to-front order"]) == [a(0), a(1), m(1), a(2), a(3)]
    assert list(more["the last"]) == [a(0), a(1), m(1), a(2), a(3)]
    assert list(more["evenly spaced"]) == [a(0), m(0), m(1), a(2), a(3)]
    assert all(len(chosen) == 2 for name, chosen in found.items() if name.startswith("random"))


def test_random_sets_are_the_same_every_time():
    points = [a(i) for i in range(9)]
    drops = Drops.of(dict.fromkeys(points, DROP))
    found = baseline_sets(drops, 3, paper_order=points)
    assert found == baseline_sets(drops, 3, paper_order=points)
    assert len({found[f"random, seed {s}"] for s in range(5)}) == 5


def test_the_papers_order_is_by_what_each_block_adds_to_those_behind_it():
    points = [a(0), a(1), a(2)]
    assert paper_order(points, [comparison(0.7), comparison(0.4), comparison(0.35)]) == [a(1), a(0), a(2)]


def with_base(sets):
    return [comparison(0.1 + sum({a(0): 0.02, a(2): 0.01}[p] for p in drops)) for drops in sets]


def test_the_papers_order_and_its_sets():
    points = [a(0), a(1), a(2)]
    equal = [comparison(kl) for kl in (0.3, 0.2, 0.1)]
    assert paper_order(points, equal) == points  # equal shares: in the order of the blocks
    assert paper_order(points, [comparison(kl) for kl in (0.6, 0.5, 0.2)]) == [a(0), a(2), a(1)]
    with pytest.raises(ValueError, match="zip"):
        paper_order(points[:2], equal)
    # a recovered checkpoint costs 0.1 with none of them dropped: block 2 adds 0.01, block 0 adds 0.02
    assert paper_order([a(0), a(2)], [comparison(0.13), comparison(0.11)], base=0.1) == [a(2), a(0)]
    assert Baselines(Drops.of({a(0): DROP, a(2): DROP}), Calibration(with_base)).paper_order == [a(2), a(0)]
    drops = Drops.of(dict.fromkeys([*points, m(0)], DROP))
    assert [list(d) for d in back_to_front(drops)] == [points, points[1:], points[2:]]


@pytest.mark.parametrize("n", range(1, 8))
def test_a_plan_never_loses_against_what_anyone_would_try_first(n):
    fisher = random_fisher(4, 11)
    truth = random_fisher(4, 12)  # the profile is of no use at all

    def world(sets):
        return [comparison(predicted(truth, set(drops))) for drops in sets]

    p, b = fisher_profile(fisher), budget("drop", n, [DROP])
    calibration = Calibration(world)
    baselines = Baselines(drops_of(candidates(p, b)), calibration)
    choice = choose(p, b, calibration=calibration, verify=lambda drops, used_up: world([drops])[0], baselines=baselines)
    compared = baselines.compare(choice.drops)
    assert len(compared) == 9 and all(len(drops) == n for drops in baselines.of_size(n).values())
    assert compared["this plan"].kl == min(c.kl for c in compared.values())


def test_baselines_are_offered_to_the_choice():
    """A baseline set that measures best is taken, though the profile thinks nothing of it."""
    p = make_profile([0.4, 0.1, 0.05, *[0.06] * 9])
    cheap = dict.fromkeys(range(12), 1.0) | {10: 0.001, 11: 0.001}
    baselines = SimpleNamespace(of_size=lambda n: {"one": Drops.of({a(10): DROP, a(11): DROP})})
    choice = chosen(p, budget("drop", 2, [DROP]), total(cheap), total(cheap), baselines)
    assert choice.drops.blocks("attention") == [10, 11]


def test_sets_not_measured_on_the_way_are_measured_for_the_comparison():
    """The paper's thresholds measure nothing on the calibration text; sets that were are not measured again."""
    p, b, asked = make_profile([0.4, 0.1, 0.05]), budget("tau", 1.25, [DROP]), []

    def world(sets):
        asked.extend(sets)
        return total([0.4, 0.1, 0.05])(sets)

    calibration = Calibration(world)
    baselines = Baselines(drops_of(candidates(p, b)), calibration)
    choice = choose(p, b, calibration=calibration, verify=lambda drops, used_up: comparison(0.15), baselines=baselines)
    assert list(choice.drops) == [a(1), a(2)] and calibration.measured == {} == dict.fromkeys(asked)
    compared = baselines.compare(choice.drops)
    named = baseline_sets(baselines.drops, 2, paper_order=[a(2), a(1), a(0)])
    for name, points in {"this plan": [a(1), a(2)], **named}.items():
        assert compared[name].kl == pytest.approx(sum([0.4, 0.1, 0.05][q.block] for q in points)), name
    before = list(asked)
    assert baselines.compare(choice.drops) == compared and asked == before
