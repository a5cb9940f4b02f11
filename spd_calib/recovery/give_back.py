"""Keeping sync points again until a recovered model keeps a budget: of the treated blocks those that cost most.

A block that is given back is the dense model's, both its sync points kept. One whose ranks compute all heads needs no
sync for that: it has the dense weights again, and its attention's stays dropped. What the others were fitted to shifts
a little, towards the dense model.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from spd_calib.formats.drops import Drop, Drops, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison
from spd_calib.formats.recovery import Attempt
from spd_calib.planning.budget import cost, describe, kept

from .held_out import HeldOut
from .planned_model import PlannedModel
from .report import DENSE_AGAIN, GIVEN_BACK, judged_by_whole
from .student import Student

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
    treated, exact = dict(model.students), with_dense_weights(model)
    treatments = {block: DENSE_AGAIN if block in exact else GIVEN_BACK for block in treated}
    order = ranked(model, text, treatments, instead=exact, tick=tick)
    low, high = 1, len(order)  # with all of them given back it is the dense model
    while low < high:
        tried = (low + high) // 2
        replace_blocks(model, treated, [a.block for a in order[:tried]], instead=exact)
        found = text.measure().comparison()
        tick(f"{tried} of {len(treated)} blocks given back: {describe(budget, cost(budget, found))}")
        low, high = (low, tried) if kept(budget, found, certain=True) else (tried + 1, high)
    replace_blocks(model, treated, [a.block for a in order[:low]], instead=exact)
    return order[:low]


def ranked(
    model: PlannedModel,
    text: HeldOut,
    treatments: Mapping[int, str],
    *,
    instead: Mapping[int, Student],
    tick: Callable[[str], None],
) -> list[Attempt]:
    """Return an attempt at replacing each block alone, those that win most first; the model stays as it was.

    `treatments` says, by block, what that is called; each becomes its student of `instead`, or the dense model's where
    that has none. The KL is that of the whole on some of the text.
    """
    some = HeldOut(model, text.sequences[:RANKED_ON], batch_size=text.batch_size)
    treated, before, found = dict(model.students), some.measure(), list[Attempt]()
    for block, treatment in treatments.items():
        began = time.monotonic()
        replace_blocks(model, treated, [block], instead=instead)
        after = some.measure()
        attempt = judged_by_whole(block, treatment, before, after, began=began)
        found.append(attempt.model_copy(update={"kept": True}))
        tick(f"block {block} {treatment} alone: KL {before.kl():.4f} -> {after.kl():.4f}")
    model.students = treated
    return sorted(found, key=lambda attempt: attempt.fell or 0.0, reverse=True)


def with_dense_weights(model: PlannedModel) -> dict[int, Student]:
    """Return the blocks whose ranks compute all heads, by their place, with the dense weights, the MLP's sync kept."""
    found = {}
    for block, student in model.students.items():
        if student.has_every_head:
            drop = Drop(Strategy.BLOCK_DROP, replicated=student.replicated)
            found[block] = model.as_dense(block, Drops({student.block.attention_point: drop}))
    return found


def replace_blocks(
    model: PlannedModel, treated: Mapping[int, Student], blocks: Sequence[int | None], *, instead: Mapping[int, Student]
) -> None:
    """Give the model the `treated` blocks, those of `blocks` as `instead` has them, or else the dense model's."""
    model.students = {
        block: instead[block] if block in blocks else student
        for block, student in treated.items()
        if block not in blocks or block in instead
    }
