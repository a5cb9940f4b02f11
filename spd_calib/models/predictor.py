"""Predictors: a rank's MLP reads a prediction of the whole attention output in place of its own partial sum.

The predictor sees what the rank has itself, so it needs no sync: its head outputs z, and its own share. That is its
partial sum (o_proj's bias left out of it, and of the prediction); where the attention's output goes through a norm A
before it joins the residual stream, it is A(partial + bias of o_proj), and A of the whole sum is what is predicted. The
forms:

    mean      share + bias                        free: a bias
    low_rank  share + bias + (z A) B              k * (d_rank + d) more weights
    full      z W + bias                          d_rank * d more weights, one matrix product with o_proj's slice

    scaled    scale * share takes the place of the share, and is added in `full`, too: behind a norm, whose output
              is as large for a part of the sum as for the whole; free: the norm's own weight times it

The residual stream still gets the exact partial sums; only what the MLP reads is predicted.

Where the MLP is a mixture of experts, its router reads a prediction of its own, the same on all ranks: z is then n1(x),
x the stream that all ranks share before the attention, d_rank is d, and there is no partial sum (it is zero).
"""

import copy
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from spd_calib.errors import InputError

PredictorKind = Literal["mean", "low_rank", "full"]


class Predictor(nn.Module):
    """One rank's predictor in one block. bias, scale [d]; low_rank: a [d_rank, k], b [k, d]; full: w [d_rank, d]."""

    bias: Tensor
    scale: Tensor | None
    a: Tensor | None
    b: Tensor | None
    w: Tensor | None

    def __init__(
        self,
        bias: Tensor,
        *,
        scale: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        w: Tensor | None = None,
    ):
        super().__init__()
        for name, tensor in (("bias", bias), ("scale", scale), ("a", a), ("b", b), ("w", w)):
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def kind(self) -> PredictorKind:
        return "full" if self.w is not None else "low_rank" if self.a is not None else "mean"

    @property
    def rank(self) -> int:
        """Return k of the low-rank form; 0 for the others."""
        return self.a.shape[1] if self.a is not None else 0

    def forward(self, z: Tensor, share: Tensor) -> Tensor:
        """Predict what the sum of all ranks' partial sums adds to the residual stream.

        z [B, T, d_rank] enters the rank's slice of o_proj; share and what is returned are [B, T, d].
        """
        if self.scale is not None:
            share = share * self.scale
        if self.w is not None:
            predicted = z @ self.w + self.bias
            return predicted if self.scale is None else predicted + share
        predicted = share + self.bias
        return predicted if self.a is None or self.b is None else predicted + z @ self.a @ self.b

    def like(self, other: Tensor) -> "Predictor":
        """Return the predictor on the device and in the dtype of `other`: itself where it is there already."""
        if self.bias.dtype == other.dtype and self.bias.device == other.device:
            return self
        return copy.deepcopy(self).to(other)


def predictor_shapes(
    kind: PredictorKind, k: int, *, d_rank: int, d: int, scaled: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of one rank's predictor, by its name; `k` is the rank of the low-rank form."""
    forms: dict[str, dict[str, tuple[int, ...]]] = {
        "mean": {"bias": (d,)},
        "low_rank": {"bias": (d,), "a": (d_rank, k), "b": (k, d)},
        "full": {"bias": (d,), "w": (d_rank, d)},
    }
    return {**forms[kind], "scale": (d,)} if scaled else forms[kind]


def check_predictors(block: int, predictors: Mapping[int, Predictor], *, d_rank: int, d: int) -> None:
    """Raise InputError unless every predictor (by rank) reads d_rank head outputs and gives d values."""
    for rank, p in predictors.items():
        found = {name: tuple(t.shape) for name, t in p.named_parameters()}
        if found != predictor_shapes(p.kind, p.rank, d_rank=d_rank, d=d, scaled=p.scale is not None):
            raise InputError(
                f"The compensation of block {block}, rank {rank}, does not fit the model's heads and width."
            )


def check_router_predictor(block: int, predictor: Predictor, *, d: int) -> None:
    """Raise InputError unless the predictor of a block's router reads d values and gives d values."""
    found = {name: tuple(t.shape) for name, t in predictor.named_parameters()}
    if found != predictor_shapes(predictor.kind, predictor.rank, d_rank=d, d=d):
        raise InputError(f"The predictor of block {block}'s router does not fit the model's width.")
