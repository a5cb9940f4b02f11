"""Choosing how each sync point is treated where the bytes in the syncs' messages are what is scarce (`max_bytes`).

Each sync point has options: kept as it is, kept with fewer bits, dropped; each with a KL and bytes. Costs add up, as
errors of quantisation do to second order, being independent; that neighbouring drops cost more than their sum is not in
it, so what is chosen is to be measured as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import SpdError
from spd_calib.formats.drops import BITS, SUBLAYERS, Drop, Drops, Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile
from spd_calib.parallel.quantised_sync import bytes_a_value

from .candidates import candidates
from .search import Choice, Verify
from .whole_plans import Calibration

MEASURED_BITS = 4  # of these each sync is measured alone; what more bits cost follows


@dataclass(frozen=True)
class Option:
    """One way to treat a sync point: what it costs alone, nats per token, and the bytes that its message then has."""

    treatment: Drop
    kl: float
    bytes: float


def at_bits(kl: float, measured_bits: int, bits: int) -> float:
    """Return the KL of a quantised sync of so many bits, given that of another: it goes as the square of the step."""
    return kl * ((2**measured_bits - 1) / (2**bits - 1)) ** 2


def within_bytes(options: Mapping[Point, Sequence[Option]], max_bytes: float) -> Drops:
    """Return the drops whose messages have at most `max_bytes`, as cheap as a greedy choice finds them.

    It starts with the most bytes at each point, and again and again takes the change that costs the least KL for each
    byte saved. Raises SpdError where even the fewest bytes at each point are more than `max_bytes`.
    """
    chosen = {point: max(own, key=lambda o: (o.bytes, -o.kl)) for point, own in options.items()}
    while sum(option.bytes for option in chosen.values()) > max_bytes:
        changes = [
            ((new.kl - chosen[point].kl) / (chosen[point].bytes - new.bytes), point, new)
            for point, own in options.items()
            for new in own
            if new.bytes < chosen[point].bytes
        ]
        if not changes:
            raise SpdError(f"The syncs' messages cannot have {max_bytes:.4g} bytes or fewer with these options.")
        _, point, best = min(changes, key=lambda change: change[:2])
        chosen[point] = best
    return Drops({point: option.treatment for point, option in chosen.items()})


def choose_bytes(
    profile: Profile, budget: Budget, *, num_blocks: int, calibration: Calibration, verify: Verify
) -> Choice:
    """Choose the treatment of every sync point of a model, so that the messages keep to a share of their bytes.

    What dropping costs alone stands in the profile; what fewer bits cost is measured on a part of the calibration text.
    On the whole of it plans that drop some, that drop none and that have one number of bits everywhere are measured,
    and the cheapest is verified. Raises SpdError where even the fewest bytes are too many.
    """
    points = [Point(b, s) for b in range(num_blocks) for s in SUBLAYERS if Point(b, s) not in profile.settled]
    most = budget.value * 2 * num_blocks * bytes_a_value(None)
    alone = {point: Drops.of_bits({point: MEASURED_BITS}) for point in points}
    measured = calibration.measure_on_part([*alone.values(), Drops()])
    base = measured[Drops()].kl  # above 0 for a recovered checkpoint
    quantised = {p: max(measured[drops].kl - base, 0.0) for p, drops in alone.items()}
    kept = {
        p: [_kept(None, 0.0), *(_kept(b, at_bits(kl, MEASURED_BITS, b)) for b in BITS)] for p, kl in quantised.items()
    }
    dropped = {c.point: Option(Drop(c.strategy), c.kl, 0.0) for c in candidates(profile, budget)}
    options = {p: [*own, dropped[p]] if p in dropped else own for p, own in kept.items()}
    found = [within_bytes(options, most)]
    if most >= len(points) * bytes_a_value(min(BITS)):
        found += [within_bytes(kept, most)]
        found += [Drops.of_bits(dict.fromkeys(points, b)) for b in BITS if len(points) * bytes_a_value(b) <= most]
    costs = calibration.measure(found)
    drops = min(zip(costs, found, strict=True), key=lambda pair: pair[0].kl)[1]
    predicted = base + sum(next(o.kl for o in options[p] if o.treatment == drops.at(p)) for p in points)
    return Choice(drops, verify(drops, 0), predicted, given_back=0, rounds=0)


def _kept(bits: int | None, kl: float) -> Option:
    return Option(Drop(Strategy.KEEP_SYNC, bits=bits), kl, bytes_a_value(bits))
