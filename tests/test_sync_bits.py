"""Choosing treatments of sync points within a number of bytes, or seconds: against every combination there is."""

import itertools
from dataclasses import replace

import pytest
from profiles import a, budget, comparison, m, make_profile, recovered

from spd_calib.errors import SpdError
from spd_calib.formats.drops import KEPT, Drop, Drops, Point, Strategy
from spd_calib.planning.latency import LatencyModel, Step, Sync
from spd_calib.planning.sync_bits import Limit, Option, at_each, choose_within, limit_of_bytes, limit_of_seconds, within
from spd_calib.planning.whole_plans import Calibration

POINTS = [Point(block, sublayer) for block in range(2) for sublayer in ("attention", "mlp")]
KL_AT_FOUR = dict(zip(POINTS, (0.2, 0.001, 0.03, 0.004), strict=True))


def at_bits(kl_at_four: float, bits: int, power: float = 2) -> float:
    """What a sync costs whose KL goes as a power of the step, of 2**bits - 1 there are."""
    return kl_at_four * (15 / (2**bits - 1)) ** power


def drops_within(every, most: float) -> Drops:
    return Drops({p: option.treatment for p, option in within(every, most).items()})


def options(point: Point) -> list[Option]:
    kl = KL_AT_FOUR[point]
    found = [
        Option(KEPT, 0.0, 16.0),
        *(Option(Drop(Strategy.KEEP_SYNC, bits=b), at_bits(kl, b), b) for b in (8, 6, 4)),
    ]
    return [*found, Option(Drop(Strategy.BLOCK_DROP), 0.05, 0.0)] if point.sync_point == "attention" else found


@pytest.mark.parametrize("max_bytes", range(8, 66))
def test_what_is_chosen_is_near_the_cheapest_of_all_combinations(max_bytes):
    """Greedy changes may save a little more than was asked: never is it worse than the best of 12 bytes fewer."""
    every = {point: options(point) for point in POINTS}
    drops = drops_within(every, max_bytes)

    def cost(chosen) -> tuple[float, float]:
        return sum(o.kl for o in chosen), sum(o.price for o in chosen)

    kl, used = cost([next(o for o in every[p] if o.treatment == drops.at(p)) for p in POINTS])
    found = [cost(chosen) for chosen in itertools.product(*every.values())]
    assert used <= max_bytes
    assert kl <= min((k for k, size in found if size <= max_bytes - 12), default=1.0)


def test_ample_bytes_change_nothing_and_too_few_are_refused():
    every = {point: options(point) for point in POINTS}
    assert drops_within(every, 64) == Drops()
    assert within(every, 7) is None


def test_the_change_taken_first_saves_its_bytes_at_the_least_cost():
    """By hand: 0.01 a byte before 0.0125, however many bytes are left; of as many bytes the cheaper option."""
    p, q, kept, dropped = POINTS[0], POINTS[2], Option(KEPT, 0.0, 16.0), Drop(Strategy.BLOCK_DROP)
    eight, four = (Drop(Strategy.KEEP_SYNC, bits=b) for b in (8, 4))
    every = {p: [kept, Option(dropped, 0.16, 0.0)], q: [kept, Option(eight, 0.05, 12.0)]}
    assert drops_within(every, 16) == Drops({p: dropped})
    assert drops_within(every, 15) == Drops({p: dropped, q: eight})
    assert drops_within({p: [Option(eight, 0.5, 16.0), kept]}, 16) == Drops()
    equal = {p: [kept, Option(eight, 0.1, 8.0), Option(four, 0.2, 0.0)]}  # as much a byte: the first of them
    assert drops_within(equal, 15) == Drops({p: eight}) and drops_within(equal, 7) == Drops({p: four})


@pytest.mark.parametrize("power", [1.5, 2, 3])
def test_what_six_bits_cost_follows_from_four_and_eight(power):
    expected = {bits: pytest.approx(at_bits(0.5, bits, power)) for bits in (8, 6, 4)}
    assert at_each(0.5, at_bits(0.5, 8, power)) == expected
    assert at_each(0.5, -1e-9) == {8: 0, 6: 0, 4: 0.5}, "no more than the noise"


AT_FOUR = {a(0): 0.2, m(0): 0.001, a(1): 0.03, m(1): 0.004, a(2): 0.002, m(2): 0.3}
DROPPED = {a(0): 0.5, a(1): 0.0005, a(2): 0.4}


def world(more_for_drops: float = 0.0, always: float = 0.0):
    """Costs add up, and any drop may cost more than the profile says; `always` is what a checkpoint costs as it is."""

    def cost(drops: Drops) -> float:
        quantised = sum(at_bits(AT_FOUR[p], bits) for p, bits in drops.bits.items())
        return always + quantised + sum(DROPPED[p] + more_for_drops for p in drops)

    return lambda sets: [comparison(cost(drops)) for drops in sets]


def chosen(share: float, measure, always: float = 0.0, limit: Limit | None = None, **of_profile):
    def verify(drops: Drops, used_up: int):
        assert used_up == 0
        return measure([drops])[0]

    profile = make_profile([always + DROPPED[a(i)] for i in range(3)], **of_profile)
    return choose_within(
        profile,
        budget("min_speedup" if limit else "max_bytes", share, strategies=[Strategy.BLOCK_DROP]),
        limit or limit_of_bytes(share, num_blocks=3, side_by_side=False),
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


def test_a_sync_that_costs_much_at_eight_bits_is_kept_whole():
    """Its cost goes as the root of the step, so that 8 bits hardly help it."""
    worst, others = m(2), [p for p in AT_FOUR if p != m(2)]

    def cost(drops: Drops) -> float:
        return sum(at_bits(0.3, bits, 0.5 if p == worst else 2) for p, bits in drops.bits.items()) + 9.0 * len(drops)

    choice = chosen((8 / 8 + 3 / 64) / 2, lambda sets: [comparison(cost(drops)) for drops in sets])
    assert choice.drops.bits.get(worst) is None and set(choice.drops.bits) >= set(others) - {a(0), a(1)}


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


def model_of_seconds(packing: float = 0.0, left: float = 0.0) -> LatencyModel:
    """3 blocks; a sync takes 16 s, of which dropped ones leave `left`; of bits a second each, and the packing."""
    quantised = {bits: Sync(bits + packing, left) for bits in (8, 6, 4)}
    return LatencyModel("h", Step("prefill", 1, 8, 2), 3, 10.0, 16.0, left=left, quantised=quantised)


@pytest.mark.parametrize("percent", [0, 5, 20, 40, 55])
@pytest.mark.parametrize("left", [0.0, 3.0])
def test_a_share_of_time_is_saved_at_a_cost_near_the_least_of_all_combinations(percent, left):
    """10 s and six syncs of 16 s: every one of 4^3 5^3 combinations, added up by hand."""
    model = model_of_seconds(left=left)
    saving = percent / 100
    choice = chosen(saving, world(), limit=limit_of_seconds(saving, model))
    took = model.seconds(len(choice.drops), choice.drops.counted_bits)
    assert (
        took <= (1 - saving) * 106 + 1e-9 and model.saved(len(choice.drops), choice.drops.counted_bits) >= saving - 1e-9
    )
    each = [[(0.0, 16.0), *((at_bits(kl, b), b) for b in (8, 6, 4))] for kl in AT_FOUR.values()]
    for own, point in zip(each, AT_FOUR, strict=True):
        own += [(DROPPED[point], left)] if point in DROPPED else []
    found = [(sum(k for k, _ in c), 10 + sum(s for _, s in c)) for c in itertools.product(*each)]
    assert choice.verified.kl <= min(k for k, s in found if s <= (1 - saving) * 106 - 12)
    for point, drop in choice.drops.by_point.items():
        us = 1e6 * (drop.bits or left)
        assert choice.reasons[point].endswith(f", {us:.1f} us in place of 16000000.0 us")
    assert set(choice.reasons) == set(choice.drops.by_point)


def test_just_what_a_model_says_of_a_plan_can_be_asked_for():
    """Every attention dropped and every MLP's sync at 4 bits is the most there is, in numbers that no float holds."""
    quantised = {bits: Sync(0.1 * bits, 0.0) for bits in (8, 6, 4)}
    model = LatencyModel("h", Step("prefill", 1, 8, 2), 3, 0.7, 1.1, quantised=quantised)
    for compute in (0.7, 0.3, 1.3, 2.1):
        model = replace(model, compute=compute)
        most = model.saved(3, {4: 3})
        choice = chosen(most, world(), limit=limit_of_seconds(most, model))
        assert (len(choice.drops), choice.drops.counted_bits) == (3, {4: 3})


def test_bits_that_take_longer_than_they_save_are_not_taken():
    """Packing of 9 s: 8 bits take 17 s, more than the sync as it is, 6 bits 15 s."""
    saving = 1.5 / 106
    choice = chosen(saving, world(more_for_drops=1.0), limit=limit_of_seconds(saving, model_of_seconds(packing=9.0)))
    assert set(choice.drops.bits.values()) <= {6, 4} and choice.drops.bits


def test_more_time_than_the_syncs_take_is_refused_with_what_they_would_take():
    """Three syncs at 4 s are left where everything else is dropped; 106 s less 99 % and the 10 s are less than 0."""
    with pytest.raises(SpdError) as e:
        chosen(0.99, world(), limit=limit_of_seconds(0.99, model_of_seconds()))
    assert str(e.value) == (
        "99 % of the time saved: that is more than these sync points can give, whose syncs would together take "
        "12000000.0 us where -8940000.0 us are left for them; ask for less."
    )


def test_what_a_recovered_checkpoint_drops_has_its_share_of_the_time():
    """Its own drop leaves 3 s: of 106 s, 64 s leave 51 s for five syncs."""
    profile = {"recovered": recovered([a(0)], comparison(0.05))}
    saving = 42 / 106
    choice = chosen(
        saving, world(always=0.05), 0.05, limit=limit_of_seconds(saving, model_of_seconds(left=3.0)), **profile
    )
    prices = [choice.drops.at(p).bits or (3 if p in choice.drops else 16) for p in AT_FOUR if p != a(0)]
    assert sum(prices) <= 51 and a(0) not in choice.drops.by_point
