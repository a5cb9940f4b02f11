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


def test_the_change_taken_first_saves_its_bytes_at_the_least_cost():
    """By hand: 0.01 a byte before 0.0125, however many bytes are left; of as many bytes the cheaper option."""
    p, q, kept, dropped = POINTS[0], POINTS[2], Option(KEPT, 0.0, 16.0), Drop(Strategy.BLOCK_DROP)
    eight, four = (Drop(Strategy.KEEP_SYNC, bits=b) for b in (8, 4))
    every = {p: [kept, Option(dropped, 0.16, 0.0)], q: [kept, Option(eight, 0.05, 12.0)]}
    assert within_bytes(every, 16) == Drops({p: dropped})
    assert within_bytes(every, 15) == Drops({p: dropped, q: eight})
    assert within_bytes({p: [Option(eight, 0.5, 16.0), kept]}, 16) == Drops()
    equal = {p: [kept, Option(eight, 0.1, 8.0), Option(four, 0.2, 0.0)]}  # as much a byte: the first of them
    assert within_bytes(equal, 15) == Drops({p: eight}) and within_bytes(equal, 7) == Drops({p: four})


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
    def verify(drops: Drops, used_up: int):
        assert used_up == 0
        return measure([drops])[0]

    profile = make_profile([always + DROPPED[a(i)] for i in range(3)], **of_profile)
    return choose_bytes(
        profile,
        budget("max_bytes", share, strategies=[Strategy.BLOCK_DROP]),
        num_blocks=3,
        calibration=Calibration(measure),
        verify=verify,
    )


def test_a_harmless_attention_is_dropped_and_what_carries_the_cost_gets_more_bits():
    choice = chosen(0.3, world())
    assert list(choice.drops) == [a(1)] and choice.drops.strategy(a(1)) == Strategy.BLOCK_DROP
    assert choice.drops.bits[a(0)] > choice.drops.bits[m(0)] == 4
    assert choice.predicted_kl == pytest.approx(choice.verified.kl)
    assert choice.verified.kl < 0.5 * world()([Drops.of_bits(dict.fromkeys(AT_FOUR, 4))])[0].kl


def test_where_drops_cost_more_together_none_is_taken():
    choice = chosen(0.3, world(more_for_drops=1.0))
    assert list(choice.drops) == [] and choice.verified.kl < sum(AT_FOUR.values())


def test_what_the_bytes_just_suffice_for_is_taken():
    """All of them as they are; all of them at 4 bits, half a byte each and 3 bytes more for 64."""
    ample = chosen(1.0, world())
    assert ample.drops == Drops() and ample.predicted_kl == ample.verified.kl == 0
    exact = chosen((4 / 8 + 3 / 64) / 2, world(more_for_drops=1.0))
    assert exact.drops == Drops.of_bits(dict.fromkeys(AT_FOUR, 4))


def test_one_number_of_bits_everywhere_is_taken_where_it_measures_best():
    """As it does where the errors of one number of bits cancel, which no sum over sync points says."""
    all_at_six = Drops.of_bits(dict.fromkeys(AT_FOUR, 6))

    def measure(sets):
        return [comparison(0.0) if drops == all_at_six else world(0.1)([drops])[0] for drops in sets]

    assert chosen((6 / 8 + 3 / 64) / 2, measure).drops == all_at_six
    assert chosen(0.39, measure).drops != all_at_six, "its messages have 0.3984 of the bytes"


def test_a_recovered_checkpoint_keeps_its_own_drops_which_send_nothing():
    """They are in all that is measured already, and their sync points are left alone."""
    choice = chosen(0.25, world(always=0.05), 0.05, recovered=recovered([a(0)], comparison(0.05)))
    assert a(0) not in choice.drops.by_point and choice.predicted_kl == pytest.approx(choice.verified.kl)
    assert choice.drops.bits[m(2)] > 4  # at 6 syncs a quarter is less than 4 bits; a(0) sends none
