"""Random predictors of each kind, large enough to be noticed."""

import torch

from spd_calib.models.predictor import Predictor

KINDS = ("mean", "low_rank", "full")
K = 3  # the rank of the low-rank kind


def predictor(kind: str, d_rank: int, d: int, seed: int) -> Predictor:
    """A predictor from d_rank head outputs to d values, drawn by `seed`."""
    draw = torch.Generator().manual_seed(seed)
    bias = 0.3 * torch.randn(d, generator=draw)
    if kind == "low_rank":
        return Predictor(bias, a=torch.randn(d_rank, K, generator=draw), b=torch.randn(K, d, generator=draw))
    return Predictor(bias, w=torch.randn(d_rank, d, generator=draw)) if kind == "full" else Predictor(bias)
