"""Replicating heads in a recovered model: in the blocks that cost most after recovery, which are others than before.

A block with all heads of other ranks replicated is the dense block, its attention's sync still dropped: its price are
weights that a rank reads more, not a sync. The second pass refits it behind what the blocks in front of it leave.
"""

from collections.abc import Callable, Sequence

from spd_calib.formats.drops import Drop, Drops, Groups, Strategy
from spd_calib.formats.recovery import Attempt
from spd_calib.planning.replication import Affordable

from .give_back import ranked
from .held_out import HeldOut
from .planned_model import PlannedModel
from .report import REPLICATED
from .student import Student


def worth_replicating(
    model: PlannedModel, text: HeldOut, blocks: Sequence[int], *, heads: Affordable, tick: Callable[[str], None]
) -> list[Attempt]:
    """Return an attempt for each of those of `blocks`, as many as `heads` allow, where all heads replicated win most.

    Each wins something. The model stays as it was.
    """
    exact = {student.index: student for student in with_every_head(model, blocks, heads.every)}
    order = ranked(model, text, dict.fromkeys(blocks, REPLICATED), instead=exact, tick=tick)
    return [attempt for attempt in order[: heads.blocks] if attempt.fell and attempt.fell > 0]


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
