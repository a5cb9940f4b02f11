"""Drops: the one value that says which sync points are dropped, and how."""

import dataclasses

import pytest
from pydantic import ValidationError

from spd_calib.formats.drops import KEPT, NOTHING_DROPPED, Drop, Drops, Point, Strategy

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
A0, A1, A2 = (Point(block, "attention") for block in range(3))
M0, M1 = (Point(block, "mlp") for block in range(2))
MIXED = Drops.of({M0: DROP, A2: PLAIN, A0: DROP})


def test_points_sort_as_the_model_meets_them_and_say_where_they_are():
    assert sorted([A2, M1, A1, M0, A0]) == [A0, M0, A1, M1, A2]
    assert (str(A1), str(M1)) == ("block 1", "block 1 MLP")
    assert Point(block=1, sync_point="mlp") == M1 and len({Point(1, "mlp"), M1}) == 1
    for block, sync_point in ((-1, "mlp"), (0, "head"), ("one", "mlp")):
        with pytest.raises(ValidationError):
            Point(block, sync_point)
    with pytest.raises(dataclasses.FrozenInstanceError):
        A0.block = 1


def test_drops_are_in_the_models_order_whatever_order_they_came_in():
    assert list(MIXED) == list(MIXED.points) == [A0, M0, A2] and len(MIXED) == 3
    assert (MIXED.blocks("attention"), MIXED.blocks("mlp")) == ([0, 2], [0])
    assert list(MIXED.by_point.values()) == [Drop(DROP), Drop(DROP), Drop(PLAIN)]


def test_every_other_point_is_kept():
    assert A0 in MIXED and A1 not in MIXED and "block 0" not in MIXED
    assert (MIXED.at(A0), MIXED.at(A1)) == (Drop(DROP), KEPT)
    assert [MIXED.strategy(p) for p in (A0, M0, A1, M1, A2)] == [DROP, DROP, KEEP, KEEP, PLAIN]


def test_what_is_said_to_be_kept_is_not_among_the_drops():
    assert Drops.of({A0: KEEP, A1: DROP}) == Drops.of({A1: DROP})
    assert Drops.of({A0: KEEP, M0: KEEP}) == Drops.of_blocks([KEEP] * 3) == Drops() == NOTHING_DROPPED
    assert not NOTHING_DROPPED and MIXED


def test_one_strategy_a_block():
    assert Drops.of_blocks([DROP, KEEP, PLAIN], [DROP, KEEP, KEEP]) == MIXED
    assert Drops.of_blocks(["block_drop", "keep_sync", "plain_drop"], ["block_drop"]) == MIXED
    assert Drops.of_blocks([KEEP, DROP]) == Drops.of({A1: DROP})
    with pytest.raises(ValueError, match="no_such_drop"):
        Drops.of_blocks(["no_such_drop"])


def test_nothing_of_them_can_be_changed():
    given = {A0: Drop(DROP)}
    drops = Drops(given)
    given[A1] = Drop(DROP)
    assert drops.points == (A0,)
    with pytest.raises(TypeError):
        drops.by_point[A1] = Drop(DROP)
    with pytest.raises(dataclasses.FrozenInstanceError):
        drops.by_point = {}
    predictors = {0: "p"}
    drop = Drop(DROP, predictors)
    predictors[1] = "q"
    assert dict(drop.predictors) == {0: "p"}
    with pytest.raises(TypeError):
        drop.predictors[1] = "q"


def test_equal_drops_are_one_key():
    again = Drops.of_blocks([DROP, KEEP, PLAIN], [DROP])
    assert again == MIXED and hash(again) == hash(MIXED) and {MIXED: 1}[again] == 1
    others = [Drops.of({A0: DROP, M0: DROP, A2: DROP}), Drops.of({A0: DROP, M0: DROP}), NOTHING_DROPPED]
    assert len({MIXED, *others}) == 4 and dict(MIXED.by_point) != MIXED
    assert len({hash(drops) for drops in (MIXED, *others)}) == 4
    predicted = Drops({**MIXED.by_point, A0: Drop(DROP, {0: "p"})})
    assert predicted != MIXED and len({predicted, MIXED}) == 2


def test_the_first_block_that_is_treated_otherwise():
    assert MIXED.first_difference(MIXED) is None and NOTHING_DROPPED.first_difference(Drops()) is None
    for other, first in (
        (NOTHING_DROPPED, 0),
        (Drops.of({A0: DROP, A2: PLAIN}), 0),  # its MLP
        (Drops.of({A0: DROP, M0: DROP}), 2),
        (Drops.of({A0: DROP, M0: DROP, A2: DROP}), 2),  # otherwise, not less
        (Drops.of({A0: DROP, M0: DROP, A1: DROP, A2: PLAIN}), 1),  # more
        (Drops({**MIXED.by_point, A0: Drop(DROP, {0: "p"})}), 0),  # predicted
    ):
        assert MIXED.first_difference(other) == other.first_difference(MIXED) == first


def test_of_two_that_treat_a_point_the_second_counts():
    both = Drops.of({A0: DROP, A1: DROP}) | Drops.of({A1: PLAIN, M1: DROP})
    assert both == Drops.of({A0: DROP, A1: PLAIN, M1: DROP}) and list(both) == [A0, A1, M1]
    assert MIXED | NOTHING_DROPPED == NOTHING_DROPPED | MIXED == MIXED


def test_some_of_the_points_alone():
    assert MIXED.only([A2, A0, A1]) == Drops.of({A0: DROP, A2: PLAIN})
    assert MIXED.only(iter([M0])) == Drops.of({M0: DROP}) and MIXED.only([]) == NOTHING_DROPPED


def test_what_a_runtime_must_know_of_them():
    assert MIXED.streams_differ and not Drops.of({A0: DROP, M0: DROP}).streams_differ
    assert MIXED.requires_mlp_drop and not Drops.of({A0: DROP, A2: PLAIN}).requires_mlp_drop


@pytest.mark.parametrize("point", [A2, M1, Point(1, "attention")])
def test_points_of_a_model_of_three_blocks_fit_it(point):
    Drops.of({point: DROP}).check_fits(3)
    NOTHING_DROPPED.check_fits(1)


@pytest.mark.parametrize(("point", "words"), [(Point(2, "mlp"), "block 2 MLP"), (Point(3, "attention"), "block 3")])
def test_behind_the_last_attention_nothing_can_be_dropped(point, words):
    with pytest.raises(ValueError, match=f"^{words} is no sync point that can be dropped in a model of 3 blocks$"):
        Drops.of({A0: DROP, point: DROP}).check_fits(3)


def test_an_mlps_debt_cannot_be_written_off():
    with pytest.raises(ValueError, match="an MLP sync point is kept or block-dropped"):
        Drops.of({M0: PLAIN})


def test_a_sync_that_is_kept_may_have_bits_and_is_not_dropped():
    bits = Drops.of_bits({M1: 4, A1: 8})
    assert list(bits) == [] and len(bits) == 0 and A1 not in bits and bits
    assert bits.bits == {A1: 8, M1: 4} and list(bits.by_point) == [A1, M1]
    assert (bits.at(A1).bits, bits.strategy(A1), bits.at(A0).bits) == (8, KEEP, None)
    both = bits | Drops.of({A0: DROP, M1: DROP})
    assert both.points == (A0, M1) and both.bits == {A1: 8} and both.only(both) == Drops.of({A0: DROP, M1: DROP})
    assert both.first_difference(Drops.of({A0: DROP, M1: DROP})) == 1 and not bits.requires_mlp_drop
    assert len({bits, Drops.of_bits({M1: 4, A1: 6}), Drops.of_bits({M1: 4})}) == 3
    Drops.of_bits({Point(2, "mlp"): 8}).check_fits(3)
    with pytest.raises(ValueError, match="block 3 is no sync point"):
        Drops.of_bits({Point(3, "attention"): 8}).check_fits(3)
    for strategy, n in ((DROP, 8), (PLAIN, 4), (KEEP, 5), (KEEP, 16)):
        with pytest.raises(ValueError, match=f"{strategy} with {n} bits: only a sync that is kept has bits"):
            Drop(strategy, bits=n)


def test_predictors_go_with_what_is_deferred():
    for strategy in (KEEP, PLAIN):
        with pytest.raises(ValueError, match=f"predictors go with block_drop, not with {strategy}"):
            Drop(strategy, {0: "p"})
    assert Drops({M0: Drop(DROP, {0: "p"})}).at(M0).predictors == {0: "p"}  # of use behind a norm alone: lm.fitted
    assert Drops({A0: Drop(DROP, {0: "p"})}).at(A0).predictors == {0: "p"}
