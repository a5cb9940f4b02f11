"""Rounding in the simulation what an engine rounds beside a quantised model's weights: the inputs of linear layers.

Engines differ in how they take the scale (of all tokens or of each, dynamic or stored), so that this is no more than
how far such rounding moves the log-probabilities: what a check allows for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from spd_calib.models.quantised import Reads
from spd_calib.models.shard import RankLinear
from spd_calib.parallel.model import TensorParallelLM

LARGEST = {"8-bit floats": 448.0, "8-bit whole numbers": 127.0}


@contextmanager
def reading_rounded(lm: TensorParallelLM, to: Reads) -> Iterator[None]:
    """Have the linear layers of every block read their inputs rounded, each rank by itself, while this lasts."""
    linears = [m for block in lm.blocks for m in block.modules() if isinstance(m, RankLinear) and to]
    for linear in linears:
        linear.forward = partial(_read, linear, to=to)  # type: ignore[method-assign]  # hooks still see what comes in
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _read(linear: RankLinear, x: Tensor, *, to: Reads) -> Tensor:
    return RankLinear.forward(linear, rounded(x, to))


def rounded(x: Tensor, to: Reads) -> Tensor:
    """Return x [..., n] rounded to 8 bits, with a scale for each token."""
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST[to]).clamp(min=torch.finfo(x.dtype).tiny)
    q = x / scale
    return (q.to(torch.float8_e4m3fn).to(x.dtype) if to == "8-bit floats" else q.round()) * scale
