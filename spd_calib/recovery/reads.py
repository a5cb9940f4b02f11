"""Reading the ranks' streams: by their MLPs with the attention's sync point dropped, and behind the block."""

from torch import Tensor

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.parallel.streams import Streams, in_full

from .student import Student


def mlp_reads(student: Student, s: Streams, partials: list[Tensor], heads: list[Tensor]) -> Streams:
    """Return what each rank's MLP reads (before the norm) with the attention's sync point dropped."""
    return student.block.behind_attention(Drop(Strategy.BLOCK_DROP, student.predictors), s, partials, heads)[1]


def settled(s: Streams) -> Tensor:
    """Return the residual stream [B, T, d] that the ranks agree on once all debts are paid.

    Of what was written off, the mean over ranks: the stream that lies nearest to all of theirs.
    """
    x = in_full(s)
    return x if s.written_off is None else x + sum(s.written_off) / len(s.written_off)
