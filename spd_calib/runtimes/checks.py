"""Rows of expected and found values, in which a check of a runtime says what it found; the same for every runtime."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.parallel.session import Session

from .observed import Observed
from .simulation import SimulatedRun


@dataclass(frozen=True)
class CheckRow:
    """One line of a check's table; both values as they are to be printed."""

    what: str
    expected: str
    found: str
    ok: bool


def folder_of(session: Session) -> Path:
    """Return the folder that a runtime's own processes load the model from; raises InputError where there is none."""
    if session.source is None:
        raise InputError("A runtime loads the model itself, so one in memory cannot be checked there; name its folder.")
    return session.source.folder


def compare_all_reduces(name: str, observed: Observed, *, expected: int) -> CheckRow:
    """Compare the all-reduces of every forward of every rank with their right number."""
    counts = [count for rank in observed.all_reduces for count in rank]
    return compare_counts(f"{name}: all-reduces per forward and rank", expected, found=counts)


def compare_run(name: str, observed: Observed, *, simulated: SimulatedRun, tolerance: float) -> list[CheckRow]:
    """Compare what a runtime made of some prompts with what the simulation makes of them.

    `tolerance`: how far a log-probability may be off.
    """
    return [
        compare_logprobs(f"{name}: prompt tokens", simulated.prompt, found=observed.prompt, tolerance=tolerance),
        compare_logprobs(f"{name}: greedy continuation", simulated.chosen, found=observed.chosen, tolerance=tolerance),
        compare_logprobs(
            f"{name}: its tokens are the likeliest", simulated.best, found=simulated.chosen, tolerance=2 * tolerance
        ),
    ]


def compare_logprobs(
    what: str, expected: Sequence[Sequence[float]], *, found: Sequence[Sequence[float]], tolerance: float
) -> CheckRow:
    """Compare log-probabilities of the same tokens, one list a prompt, from the simulation and from the runtime.

    The row is ok where none is further off than `tolerance`; never where the numbers of tokens differ or a value is
    not finite.
    """
    if list(map(len, expected)) != list(map(len, found)):
        return CheckRow(what, f"{sum(map(len, expected))} tokens", f"{sum(map(len, found))} tokens", False)
    largest = largest_difference(expected, found)
    shown = f"{largest:.1e}" if any(expected) else "no token to compare"  # a prompt's first has no log-probability
    return CheckRow(what, f"max |Δ log p| ≤ {tolerance:.0e}", shown, largest <= tolerance)


def compare_counts(what: str, expected: int, *, found: Sequence[int]) -> CheckRow:
    """Check that every count, of each rank and each time, is the one expected, and that there is one at all."""
    shown = ", ".join(str(count) for count in sorted(set(found))) or "nothing counted"
    return CheckRow(what, str(expected), shown, set(found) == {expected})


def compare_experts(what: str, found: Sequence[Sequence[str]], mixtures: Sequence[int]) -> CheckRow:
    """Check digests of the experts chosen, by rank, in each of the blocks `mixtures`: the same on all ranks."""
    expected = "the same in every block"
    if not found or any(len(rank) != len(mixtures) for rank in found):
        return CheckRow(what, expected, "not all seen", False)
    differ = [block for block, digests in zip(mixtures, zip(*found, strict=True), strict=True) if len(set(digests)) > 1]
    return CheckRow(what, expected, f"differ from block {differ[0]} on" if differ else expected, not differ)


def largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Return the largest |a - b| over all tokens of all prompts; infinite where either is not a number."""
    pairs = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)]
    return max((abs(x - y) if math.isfinite(x - y) else math.inf for x, y in pairs), default=0.0)
