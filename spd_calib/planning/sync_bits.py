"""Choosing how each sync point is treated where the bytes of the syncs are scarce (`max_bytes`), or a step's time.

Each sync point has options: kept as it is, kept with fewer bits, dropped; each with a KL and a price, in bytes of its
message or in seconds of the latency model. Costs add up, as errors of quantisation do to second order, being
independent; that neighbouring drops cost more than their sum is not in it, so what is chosen is to be measured as a
whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import SpdError
from spd_calib.formats.drops import BITS, KEPT, NOTHING_DROPPED, SUBLAYERS, Drop, Drops, Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile
from spd_calib.parallel.quantised_sync import bytes_a_value

from .budget import describe
from .candidates import candidates
from .latency import LatencyModel
from .search import Choice, Verify
from .whole_plans import Calibration

ANY_BITS = "any"  # of `sync_bits`: the planner chooses
FEW, MANY = min(BITS), max(BITS)  # of these each sync is measured alone; what the bits between cost follows
AT_BITS = {bits: Drop(Strategy.KEEP_SYNC, bits=bits) for bits in BITS}


def every_sync(bits: int | None, num_blocks: int) -> Drops:
    """Return every sync of a model of so many blocks with these bits; nothing for None."""
    points = [Point(block, sublayer) for block in range(num_blocks) for sublayer in SUBLAYERS]
    return NOTHING_DROPPED if bits is None else Drops.of_bits(dict.fromkeys(points, bits))


def in_words(treatment: Drop) -> str:
    """Return how a sync point is treated, for people to read."""
    if treatment.bits:
        return f"{treatment.bits} bits"
    return "kept" if treatment.strategy == Strategy.KEEP_SYNC else str(treatment.strategy)


@dataclass(frozen=True)
class Option:
    """One way to treat a sync point: what it costs alone, nats per token, and its price, as a `Limit` has it."""

    treatment: Drop
    kl: float
    price: float


@dataclass(frozen=True)
class Limit:
    """Says what the treatments of all sync points may take together, and what each takes; `told` puts that in words."""

    most: float
    price: Callable[[Drop], float]
    told: Callable[[float], str]


def limit_of_bytes(share: float, *, num_blocks: int, side_by_side: bool) -> Limit:
    """Return the limit of this share of the bytes that all syncs' messages have at 16 bits; prices are of a value.

    Where partial sums that wait travel `side_by_side` with those of the next sync, behind norms, a deferred one takes
    as much as that sync lets it: up to 16 bits.
    """

    def price(treatment: Drop) -> float:
        if treatment.strategy == Strategy.KEEP_SYNC:
            return bytes_a_value(treatment.bits)
        return bytes_a_value(None) if side_by_side and treatment.strategy == Strategy.BLOCK_DROP else 0.0

    return Limit(share * 2 * num_blocks * bytes_a_value(None), price, lambda price: f"{price:.3g} bytes a value")


def limit_of_seconds(saving: float, model: LatencyModel) -> Limit:
    """Return the limit on the syncs' seconds that leaves a step this share shorter than the dense one."""
    dense = model.seconds(0)
    most = (1 - saving) * dense - model.compute - model.added + 1e-12 * dense  # that rounding asks for nothing more
    return Limit(most, model.of, lambda price: f"{1e6 * price:.1f} us")


def at_each(at_few: float, at_many: float) -> dict[int, float]:
    """Return the KL of a quantised sync by its bits, given that of the fewest and of the most.

    It goes as a power of the step: the square where errors are small, less where they are not.
    """
    low, high = max(at_few, 0.0), max(at_many, 0.0)

    def at(bits: int) -> float:
        share = math.log((2**bits - 1) / (2**FEW - 1)) / math.log((2**MANY - 1) / (2**FEW - 1))
        return low ** (1 - share) * high**share

    return {bits: at(bits) for bits in BITS}


def within(options: Mapping[Point, Sequence[Option]], most: float) -> dict[Point, Option] | None:
    """Return options whose prices come to at most `most`, as cheap in KL as a greedy choice finds them.

    It starts with every sync kept as it is, and again and again takes the change that costs the least KL for what it
    saves. Returns None where even the lowest price at each point is too much.
    """
    chosen = {point: next(o for o in own if o.treatment == KEPT) for point, own in options.items()}
    while sum(option.price for option in chosen.values()) > most:
        changes = [
            ((new.kl - chosen[point].kl) / (chosen[point].price - new.price), point, new)
            for point, own in options.items()
            for new in own
            if new.price < chosen[point].price
        ]
        if not changes:
            return None
        _, point, best = min(changes, key=lambda change: change[:2])
        chosen[point] = best
    return chosen


def choose_within(
    profile: Profile, budget: Budget, limit: Limit, *, num_blocks: int, calibration: Calibration, verify: Verify
) -> Choice:
    """Choose the treatment of every sync point of a model, so that together they keep to a limit.

    What dropping costs alone stands in the profile; what fewer bits cost is measured on a part of the calibration text.
    On the whole of it plans that drop some, that drop none and that have one number of bits everywhere are measured,
    and the cheapest is verified. Raises SpdError where even the lowest prices are too much.
    """
    points = [Point(b, s) for b in range(num_blocks) for s in SUBLAYERS if Point(b, s) not in profile.settled]
    most = limit.most - sum(limit.price(Drop(Strategy.BLOCK_DROP)) for _ in profile.settled)
    alone = {(point, bits): Drops.of_bits({point: bits}) for point in points for bits in (FEW, MANY)}
    measured = calibration.measure_on_part([*alone.values(), Drops()])
    base = measured[Drops()].kl  # above 0 for a recovered checkpoint
    extra = {key: measured[drops].kl - base for key, drops in alone.items()}
    quantised = {p: at_each(extra[p, FEW], extra[p, MANY]) for p in points}
    price = {drop: limit.price(drop) for drop in (KEPT, *AT_BITS.values())}
    kept = {
        p: [Option(KEPT, 0.0, price[KEPT])] + [Option(drop, kl[bits], price[drop]) for bits, drop in AT_BITS.items()]
        for p, kl in quantised.items()
    }
    dropped = {
        c.point: Option(Drop(c.strategy), c.kl, limit.price(Drop(c.strategy))) for c in candidates(profile, budget)
    }
    options = {p: [*own, dropped[p]] if p in dropped else own for p, own in kept.items()}
    best = within(options, most)
    if best is None:
        least = sum(min(o.price for o in own) for own in options.values())
        raise SpdError(
            f"{describe(budget)}: that is more than these sync points can give, whose syncs would together take "
            f"{limit.told(least)} where {limit.told(most)} are left for them; ask for less."
        )
    found = [best, *([without_drops] if (without_drops := within(kept, most)) is not None else [])]
    found += [
        {p: own[i] for p, own in kept.items()}
        for i in range(1, 1 + len(BITS))
        if sum(own[i].price for own in kept.values()) <= most
    ]
    sets = [Drops({p: option.treatment for p, option in chosen.items()}) for chosen in found]
    costs = calibration.measure(sets)
    i = min(range(len(sets)), key=lambda i: costs[i].kl)
    reasons = {p: _reason(option, kept[p][0], limit) for p, option in found[i].items() if option.treatment != KEPT}
    predicted = base + sum(option.kl for option in found[i].values())
    return Choice(sets[i], verify(sets[i], 0), predicted, given_back=0, rounds=0, reasons=reasons)


def _reason(option: Option, as_it_is: Option, limit: Limit) -> str:
    """Return why a sync point is treated so, in words: what it costs, and saves."""
    what = in_words(option.treatment)
    return f"{what}: KL {option.kl:.3g}, {limit.told(option.price)} in place of {limit.told(as_it_is.price)}"
