"""Reading the ranks' streams: by their MLPs with the attention's sync point dropped, and behind the block."""

from torch import Tensor

from spd_calib.parallel.streams import Streams, defer

from .student import Student


def mlp_reads(student: Student, s: Streams, partials: list[Tensor], heads: list[Tensor]) -> Streams:
    """Return what each rank's MLP reads (before the norm) with the attention's sync point dropped."""
    drop = student.drops.at(student.block.attention_point)
    if drop.predictors is None:
        return defer(s, partials, student.block.o_bias)
    return student.block.predicted(drop, s, partials, heads)


def settled(s: Streams) -> Tensor:
    """Return the residual stream [B, T, d] that the ranks agree on once all debts are paid.

    Of what was written off, the mean over ranks: the stream that lies nearest to all of theirs.
    """
    x = s.shared
    if s.debt is not None:
        x = x + sum(s.debt)
    return x if s.written_off is None else x + sum(s.written_off) / len(s.written_off)
