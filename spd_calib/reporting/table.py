"""A table as text, whatever shows it: the terminal, or the page of `report`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from spd_calib.formats.drops import Strategy
from spd_calib.formats.plan import PlannedBlock


class Table(NamedTuple):
    """`left`: how many columns, from the first, are words even where they begin with a digit."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def numeric(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[bool]:
    """Return for each column whether it holds numbers, which are aligned right."""
    return [i >= left and any(row[i][:1] in "+-0123456789" for row in rows if row[i]) for i, _ in enumerate(columns)]


def percentage_points(lost: float, stderr: float | None = None) -> str:
    """Return '+1.20 ± 0.30', percentage points, for an accuracy lost, given as a fraction."""
    return f"{100 * lost:+.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")


def nats(kl: float, stderr: float | None = None) -> str:
    """Return '0.0123 ± 0.0005': four decimals, and more where these would not show two digits of the KL."""
    small = 1e-8 < abs(kl) < 1e-3
    decimals = 1 - math.floor(math.log10(abs(kl))) if small else 4
    return f"{kl:.{decimals}f}" + ("" if stderr is None else f" ± {stderr:.{decimals}f}")


def treatments(block: PlannedBlock) -> tuple[str, str]:
    """Return how a block's two sync points are treated, in words: strategy, bits, and the KV groups replicated.

    Where prefill treats one otherwise, its treatment stands behind that of decoding.
    """
    prefill, decode = ([_words(*sync) for sync in syncs] for syncs in block.syncs_by_phase)
    attention, mlp = (d if p == d else f"{d} (prefill: {p})" for p, d in zip(prefill, decode, strict=True))
    if block.replicated:
        n = len(block.replicated[0])
        attention = f"{attention}, {n} KV group{'s' if n > 1 else ''} replicated"
    return attention, mlp


def _words(strategy: Strategy, bits: int | None) -> str:
    return strategy if bits is None else f"{strategy}, {bits} bits"
