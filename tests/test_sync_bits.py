"""Choosing treatments of sync points within a number of bytes: against every combination there is."""

import itertools

import pytest

from spd_calib.errors import SpdError
from spd_calib.formats.drops import KEPT, Drop, Drops, Point, Strategy
from spd_calib.planning.sync_bits import Option, at_bits, within_bytes

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
