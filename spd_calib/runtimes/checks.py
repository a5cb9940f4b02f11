"""What a check of a runtime finds: rows of expected and found. The same for every runtime."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .simulation import Simulated


@dataclass(frozen=True)
class Row:
    """One line of the table; both values as they are to be printed."""

    what: str
    expected: str
    found: str
    ok: bool


def compare_run(
    name: str,
    simulated: Simulated,
    prompt: Sequence[Sequence[float]],
    chosen: Sequence[Sequence[float]],
    all_reduces: Sequence[Sequence[int]],
    expected: int,
    tolerance: float,
) -> list[Row]:
    """What a runtime did with some prompts, against the simulation.

    `prompt`, `chosen`: log-probabilities of the prompts' tokens and of those it went on with, one list a prompt.
    `all_reduces`: of each forward, one list a rank; `expected` of them are right.
    """
    counts = [count for rank in all_reduces for count in rank]
    return [
        compare_logprobs(f"{name}: prompt tokens", simulated.prompt, prompt, tolerance),
        compare_logprobs(f"{name}: greedy continuation", simulated.chosen, chosen, tolerance),
        compare_logprobs(f"{name}: its tokens are the likeliest", simulated.best, simulated.chosen, 2 * tolerance),
        compare_counts(f"{name}: all-reduces per forward and rank", expected, counts),
    ]


def compare_logprobs(
    what: str, expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]], tolerance: float
) -> Row:
    """Log-probabilities of the same tokens, one list a prompt, from the simulation and from the runtime.

    Holds where none is further off than `tolerance`; never where the numbers of tokens differ or a value is not finite.
    """
    if list(map(len, expected)) != list(map(len, found)):
        return Row(what, f"{sum(map(len, expected))} tokens", f"{sum(map(len, found))} tokens", False)
    largest = largest_difference(expected, found)
    return Row(what, f"max |Δ log p| ≤ {tolerance:.0e}", f"{largest:.1e}", largest <= tolerance)


def compare_counts(what: str, expected: int, found: Sequence[int]) -> Row:
    """How often something happened, on each rank and each time: always as often as expected, and at least once seen."""
    shown = ", ".join(str(count) for count in sorted(set(found))) or "nothing counted"
    return Row(what, str(expected), shown, set(found) == {expected})


def largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Largest |a - b| over all tokens of all prompts; infinite where either is not a number."""
    pairs = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)]
    return max((abs(x - y) if math.isfinite(x - y) else math.inf for x, y in pairs), default=0.0)
