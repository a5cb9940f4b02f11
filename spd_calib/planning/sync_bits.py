"""Choosing how each sync point is treated where the bytes in the syncs' messages are what is scarce.

Each sync point has options: kept as it is, kept with fewer bits, dropped; each with a KL and bytes. Costs add up, as
errors of quantisation do to second order, being independent; that neighbouring drops cost more than their sum is not in
it, so what is chosen is to be measured as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import SpdError
from spd_calib.formats.drops import Drop, Drops, Point


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
