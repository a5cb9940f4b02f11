"""Choosing treatments of sync points within a number of bytes: against every combination there is."""

import itertools

import pytest
from profiles import a, budget, comparison, m, make_profile, recovered

from spd_calib.errors import SpdError
from spd_calib.formats.drops import KEPT, Drop, Drops, Point, Strategy
from spd_calib.planning.sync_bits import Option, at_bits, choose_bytes, within_bytes
from spd_calib.planning.whole_plans import Calibration

POINTS = [Point(block, sublayer) for block in range(2) for sublayer in ("attention", "mlp")]
KL_AT_FOUR = dict(zip(POINTS, (0.2, 0.001, 0.03, 0.004), strict=True))


def options(point: Point) -> list[Option]:
    kl = KL_AT_FOUR[point]
    found = [
        Option(KEPT, 0.0, 16.0),
        *(Option(Drop(Strategy.KEEP_SYNC, bits=b), at_bits(kl, 4, b), b) for b in (8, 6, 4)),
    ]
    return [*found, Option(Drop(Strategy.BLOCK_DROP), 0.05, 0.0)] if point.sync_point == "attention" else found


@pytest.mark.parametrize("max_bytes", range(8, 66))
def test_what_is_chosen_is_near_the_cheapest_of_all_combinations(max_bytes):
    """Greedy changes may save a little more than was asked: never is it worse than the best of 12 bytes fewer."""
    every = {point: options(point) for point in POINTS}
    drops = within_bytes(every, max_bytes)

    def cost(chosen) -> tuple[float, float]:
        return sum(o.kl for o in chosen), sum(o.bytes for o in chosen)

    kl, used = cost([next(o for o in every[p] if o.treatment == drops.at(p)) for p in POINTS])
    found = [cost(chosen) for chosen in itertools.product(*every.values())]
    assert used <= max_bytes
    assert kl <= min((k for k, size in found if size <= max_bytes - 12), default=1.0)


def test_ample_bytes_change_nothing_and_too_few_are_refused():
    every = {point: options(point) for point in POINTS}
    assert within_bytes(every, 64) == Drops()
    with pytest.raises(SpdError, match="cannot have 7 bytes or fewer"):
        within_bytes(every, 7)


def test_fewer_bits_cost_as_the_square_of_their_step():
    assert at_bits(0.5, 4, 4) == 0.5
    assert at_bits(0.5, 4, 8) == pytest.approx(0.5 / 17**2)


AT_FOUR = {a(0): 0.2, m(0): 0.001, a(1): 0.03, m(1): 0.004, a(2): 0.002, m(2): 0.3}
DROPPED = {a(0): 0.5, a(1): 0.0005, a(2): 0.4}


def world(more_for_drops: float = 0.0, always: float = 0.0):
    """Costs add up, and any drop may cost more than the profile says; `always` is what a checkpoint costs as it is."""

    def cost(drops: Drops) -> float:
        quantised = sum(at_bits(AT_FOUR[p], 4, bits) for p, bits in drops.bits.items())
        return always + quantised + sum(DROPPED[p] + more_for_drops for p in drops)

    return lambda sets: [comparison(cost(drops)) for drops in sets]


def chosen(share: float, measure, always: float = 0.0, **of_profile):
    profile = make_profile([always + DROPPED[a(i)] for i in range(3)], **of_profile)
    return choose_bytes(
        profile,
        budget("max_bytes", share, strategies=[Strategy.BLOCK_DROP]),
        num_blocks=3,
        calibration=Calibration(measure),
        verify=lambda drops, used_up: measure([drops])[0],
    )


def test_a_harmless_attention_is_dropped_and_what_carries_the_cost_gets_more_bits():
    choice = chosen(0.3, world())
    assert list(choice.drops) == [a(1)] and choice.drops.bits[a(0)] > choice.drops.bits[m(0)] == 4
    assert choice.predicted_kl == pytest.approx(choice.verified.kl)
    assert choice.verified.kl < 0.5 * world()([Drops.of_bits(dict.fromkeys(AT_FOUR, 4))])[0].kl


def test_where_drops_cost_more_together_none_is_taken():
    choice = chosen(0.3, world(more_for_drops=1.0))
    assert list(choice.drops) == [] and choice.verified.kl < sum(AT_FOUR.values())


def test_a_recovered_checkpoint_keeps_its_own_drops_which_send_nothing():
    """They are in all that is measured already, and their sync points are left alone."""
    choice = chosen(0.25, world(always=0.05), 0.05, recovered=recovered([a(0)], comparison(0.05)))
    assert a(0) not in choice.drops.by_point and choice.predicted_kl == pytest.approx(choice.verified.kl)
    assert choice.drops.bits[m(2)] > 4  # at 6 syncs a quarter is less than 4 bits; a(0) sends none
