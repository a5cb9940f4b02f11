"""Fitting what ranks read where a branch's norm waits for the whole sum: a scale for each channel, and a mean.

Behind a norm A a rank's own share, A(partial + bias), is as large as what the whole sum gives, however little of it the
rank has: read as it is, it misleads. So each rank reads `scale * A(partial + bias) + mean`, the least squares fit to
A(sum + bias), channel by channel. It is free at run time. All of it follows from sums over tokens, of one dense pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.block import Block
from spd_calib.parallel.comm import Comm
from spd_calib.parallel.model import TensorParallelLM

from .measure import batches


@dataclass
class _Sums:
    """Sums over tokens of one rank's share s and of the whole w, channel by channel: [d] each, float64."""

    count: int = 0
    s: Tensor | float = 0.0
    w: Tensor | float = 0.0
    ss: Tensor | float = 0.0
    sw: Tensor | float = 0.0

    def add(self, share: Tensor, whole: Tensor) -> None:
        """Add tokens, share and whole [N, d]."""
        share, whole = share.double(), whole.double()
        self.count += len(share)
        self.s, self.w = self.s + share.sum(0), self.w + whole.sum(0)
        self.ss, self.sw = self.ss + share.square().sum(0), self.sw + (share * whole).sum(0)

    def fit(self, dtype: torch.dtype) -> Predictor:
        """Return the least squares fit whole = scale * share + bias."""
        s, w = self.s / self.count, self.w / self.count
        variance, covariance = self.ss / self.count - s * s, self.sw / self.count - s * w
        assert isinstance(variance, Tensor) and isinstance(covariance, Tensor)
        scale = covariance / variance.clamp(min=1e-12)
        return Predictor((w - scale * s).to(dtype), scale=scale.to(dtype))


@torch.no_grad()
def fit_estimates(
    lm: TensorParallelLM, sequences: Sequence[Sequence[int]], *, always: Drops = NOTHING_DROPPED, batch_size: int = 8
) -> Drops:
    """Return block_drop at every sync point whose branch holds a norm, with the predictors fitted on `sequences`.

    Left out are those that `always` drops; the rest is fitted on the model that drops them. Nothing is returned, at no
    cost, for a model without such norms. All real ranks call this at once; each gets its own predictors.
    """
    sums = {point: [_Sums() for _ in lm.comm.ranks] for point in _behind_norms(lm) if point not in always}
    for input_ids, lengths in batches(sequences, batch_size, lm.device) if sums else ():
        real = torch.arange(input_ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        with lm.running(always), _adding_to(sums, lm, real=real.to(lm.device)):
            lm.model.base_model(input_ids=input_ids, use_cache=False)
    fitted = {
        point: {rank: of_rank.fit(lm.model.dtype) for rank, of_rank in zip(lm.comm.ranks, row, strict=True)}
        for point, row in sums.items()
    }
    return Drops({point: Drop(Strategy.BLOCK_DROP, predictors) for point, predictors in fitted.items()})


def _behind_norms(lm: TensorParallelLM) -> Iterator[Point]:
    """Yield the sync points whose branch holds a norm, the last MLP's left out."""
    for block in lm.blocks:
        if block.attention_out_norm is not None:
            yield block.attention_point
        if block.mlp_out_norm is not None and block.index < lm.num_blocks - 1:
            yield block.mlp_point


@contextmanager
def _adding_to(sums: Mapping[Point, Sequence[_Sums]], lm: TensorParallelLM, *, real: Tensor) -> Iterator[None]:
    """Add to `sums`, while this lasts, what the ranks' partial sums make of the real tokens, [B, T] bool."""
    hooks = []
    for block in lm.blocks:
        for point, modules in ((block.attention_point, block.outs), (block.mlp_point, block.mlps)):
            if point in sums:
                add = _Adding(block, point, sums=sums[point], real=real, comm=lm.comm)
                hooks += [module.register_forward_hook(add) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Adding:
    """A hook that collects the partial sums of all ranks of this process, then adds them."""

    def __init__(self, block: Block, point: Point, *, sums: Sequence[_Sums], real: Tensor, comm: Comm):
        self.block, self.point, self.sums, self.real, self.comm = block, point, sums, real, comm
        self.arrived: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, partial: Tensor) -> None:
        self.arrived.append(partial[self.real])
        if len(self.arrived) == len(self.sums):
            branch = self.block.attention_branch if self.point.sync_point == "attention" else self.block.mlp_branch
            whole = branch(self.comm.all_reduce(self.arrived))
            for of_rank, own in zip(self.sums, self.arrived, strict=True):
                of_rank.add(branch(own), whole)
            self.arrived.clear()
