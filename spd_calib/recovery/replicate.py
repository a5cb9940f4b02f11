"""Replicating heads in a recovered model: in the blocks that cost most after recovery, which are others than before.

A block with all heads of other ranks replicated is the dense block, its sync still dropped. So it wins what giving the
block back to the dense model would (give_back.py), and its price are weights that a rank reads more, not a sync.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from spd_calib.formats.drops import Drop, Drops, Groups, Strategy

from .give_back import ranked
from .held_out import HeldOut
from .planned_model import PlannedModel
from .report import REPLICATED, Attempt
from .student import Student


def worth_replicating(
    model: PlannedModel, text: HeldOut, blocks: Sequence[int], *, most: int, tick: Callable[[str], None]
) -> list[Attempt]:
    """Return an attempt for each of those of `blocks`, at most `most`, where all heads replicated win most.

    None of them wins nothing. The model stays as it was.
    """
    best = [attempt for attempt in ranked(model, text, blocks, tick=tick)[:most] if attempt.fell and attempt.fell > 0]
    return [replace(attempt, treatment=REPLICATED) for attempt in best]


def with_every_head(model: PlannedModel, blocks: Sequence[int], groups: Groups) -> list[Student]:
    """Return students of the dense model's weights in these blocks, whose ranks also compute `groups`, of other ranks.

    Raises InputError where a block's heads cannot be replicated.
    """
    students = []
    for block in blocks:
        dense = model.lm.blocks[block]
        dense.replicas(groups)  # refuses
        drop = Drops({dense.attention_point: Drop(Strategy.BLOCK_DROP, replicated=groups)})
        students.append(model.as_dense(block, model.students[block].drops | drop))
    return students
