"""What a check of a runtime finds: rows of expected and found. The same for every runtime."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table; both values as they are to be printed."""

    what: str
    expected: str
    found: str
    ok: bool


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


def compare_tokens(what: str, expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> Row:
    """Generated token ids, one list a prompt: the same, or where they first part."""
    total = sum(map(len, expected))
    for prompt, (a, b) in enumerate(zip(expected, found, strict=False)):
        if list(a) != list(b):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return Row(what, f"the same {total} tokens", f"prompt {prompt} parts at token {at}", False)
    same = len(expected) == len(found)
    return Row(what, f"the same {total} tokens", "the same" if same else f"{len(found)} prompts", same)


def all_reduces(attention_dropped: int, mlp_dropped: int, num_blocks: int) -> int:
    """All-reduces of one forward: two a block, less the sync points dropped (an engine's embedding not counted)."""
    return 2 * num_blocks - attention_dropped - mlp_dropped


def largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Largest |a - b| over all tokens of all prompts; infinite where either is not a number."""
    pairs = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)]
    return max((abs(x - y) if math.isfinite(x - y) else math.inf for x, y in pairs), default=0.0)
