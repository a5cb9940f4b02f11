"""The cheapest set of every size, and its knee."""

import random

import pytest
from profiles import DROP, a, comparison, make_profile

from spd_calib.errors import InputError
from spd_calib.formats.common import Provenance
from spd_calib.formats.drops import Drops
from spd_calib.planning.pareto import knee, pareto_of

PROVENANCE = Provenance(command="c", seed=0, device="cpu", dtype="float32", versions={})


def test_the_knee_is_where_it_starts_to_cost():
    assert knee([0, 0.01, 0.02, 0.04, 0.5, 1.0]) == 3
    assert knee([0, 1]) == 0 and knee([0]) == 0


def test_knees():
    assert knee([0.0, 0.0, 0.0, 1.0]) == 2
    assert knee([1.0, 1.0, 1.0, 9.0]) == 2
    assert knee([0.0, 0.5, 0.5, 1.0, 8.0]) == 3
    assert knee([3.0]) == 0 and knee([0.0, 1.0]) == 0


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


def test_it_needs_no_measurement_and_shows_those_there_are():
    p = make_profile([0.05, 0.01, 0.02])
    found = pareto_of(p, provenance=p.provenance, measured={Drops.of({a(1): DROP}): comparison(0.015)})
    assert [x.predicted_kl for x in found.points] == pytest.approx([0, 0.01, 0.03, 0.08])
    assert [x.measured_kl for x in found.points] == [None, 0.015, None, None]
    assert found.points[2].dropped == [a(1), a(2)]


def test_it_says_which_strategy_it_does_not_know():
    with pytest.raises(InputError) as e:
        pareto_of(make_profile([0.1]), strategies=["block_drop", "drop_all"], provenance=PROVENANCE)
    assert str(e.value) == "The strategy 'drop_all' is none of keep_sync, block_drop, plain_drop."
    assert [
        p.drops for p in pareto_of(make_profile([0.1, 0.2]), strategies=["block_drop"], provenance=PROVENANCE).points
    ] == [0, 1, 2]
