"""Keeping sync points again until a recovered model keeps a budget: of the treated blocks those that cost most.

A block that is given back is the dense model's, both its sync points kept. What the others were fitted to shifts a
little, towards the dense model.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison
from spd_calib.planning.budget import cost, describe, kept

from .held_out import HeldOut, kl_fall
from .planned_model import PlannedModel
from .report import GIVEN_BACK, REPLICATED, Attempt
from .student import Student

NONE: Mapping[int, Student] = MappingProxyType({})
RANKED_ON = 16  # sequences, to see what each block costs: of 4 it is noise but for the costliest


def give_back(
    model: PlannedModel, text: HeldOut, budget: Budget, *, measured: Comparison, tick: Callable[[str], None]
) -> list[Attempt]:
    """Give back as few blocks as `model` must to keep `budget` on `text`, with standard errors to spare.

    `measured` is what it costs there with none given back. They go in the order of what giving back each alone wins, by
    the KL of the whole on some of the text. Returns an attempt for each.
    """
    if kept(budget, measured, certain=True):
        return []
    treated = dict(model.students)
    order = ranked(model, text, list(treated), tick=tick)
    low, high = 1, len(order)  # with all of them given back it is the dense model
    while low < high:
        tried = (low + high) // 2
        _leave_out(model, treated, [a.block for a in order[:tried]])
        found = text.measure().comparison()
        tick(f"{tried} of {len(treated)} blocks given back: {describe(budget, cost(budget, found))}")
        low, high = (low, tried) if kept(budget, found, certain=True) else (tried + 1, high)
    _leave_out(model, treated, [a.block for a in order[:low]])
    return order[:low]


def ranked(
    model: PlannedModel,
    text: HeldOut,
    blocks: Sequence[int],
    *,
    instead: Mapping[int, Student] = NONE,
    tick: Callable[[str], None],
) -> list[Attempt]:
    """Return an attempt at giving back each of `blocks` alone, those that win most first; the model stays as it was.

    A block of which `instead` has a student is replaced by that. The KL is that of the whole on some of the text.
    """
    some = HeldOut(model, text.sequences[:RANKED_ON], batch_size=text.batch_size)
    treated, before, found = dict(model.students), some.measure(), list[Attempt]()
    for block in blocks:
        began = time.monotonic()
        _leave_out(model, treated, [block])
        if block in instead:
            model.students[block] = instead[block]
        after = some.measure()
        fell, error = kl_fall(before, after)
        seconds, treatment = time.monotonic() - began, REPLICATED if block in instead else GIVEN_BACK
        found.append(Attempt(block, treatment, before.kl(), after.kl(), fell, error, True, seconds))
        tick(f"block {block} {treatment} alone: KL {before.kl():.4f} -> {after.kl():.4f}")
    _leave_out(model, treated, [])
    return sorted(found, key=lambda attempt: attempt.fell or 0.0, reverse=True)


def _leave_out(model: PlannedModel, treated: Mapping[int, Student], given_back: Sequence[int | None]) -> None:
    """Give the model the treated blocks but those given back."""
    model.students = {block: student for block, student in treated.items() if block not in given_back}
