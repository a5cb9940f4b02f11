"""Reading the ranks' streams: by their MLPs with the attention's sync point dropped, and behind the block."""

from torch import Tensor

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.parallel.streams import Streams, in_full

from .student import Student


def mlp_reads(student: Student, s: Streams, partials: list[Tensor], heads: list[Tensor], **kwargs) -> Streams:
    """Return what each rank's MLP reads (before the norm) with the attention's sync point dropped.

    kwargs as transformers hands them to the layer, for heads that ranks replicate.
    """
    block, drop = student.block, Drop(Strategy.BLOCK_DROP, student.predictors, replicated=student.replicated)
    return block.behind_attention(drop, s, partials, heads, block.attend_replicated(drop, s, **kwargs))[1]


def settled(s: Streams) -> Tensor:
    """Return the residual stream [B, T, d] that the ranks agree on once all debts are paid.

    Of what was written off, the mean over ranks: the stream that lies nearest to all of theirs.
    """
    x = in_full(s)
    return x if s.written_off is None else x + sum(s.written_off) / len(s.written_off)
