"""MXFP4: the weights of GPT-OSS's experts, two 4-bit floats a byte, 32 of them under one power of two.

A weight [E, in, out] of E experts lies in blocks [E, out, in / 32, 16] and scales [E, out, in / 32], both bytes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of a 4-bit float (e2m1); the highest bit is the sign
VALUES = (*POSITIVE, *(-value for value in POSITIVE))
BIAS = 127  # of a scale's exponent
IN_A_BLOCK, BYTES = 32, 16


def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape [E, in, out] of a weight from its parts'. Raises ValueError for parts that do not fit."""
    experts, out, blocks, in_a_block = shapes["blocks"]
    if in_a_block != BYTES or shapes["scales"] != (experts, out, blocks):
        raise ValueError
    return experts, blocks * IN_A_BLOCK, out


def dequantise(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight [E, in, out] in float32, exactly; the lower half of each byte comes first."""
    blocks, scales = parts["blocks"], parts["scales"]
    if bool((scales == 255).any()):
        raise ValueError("a scale is NaN")
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [E, out, in / 32, 32]
    values = torch.tensor(VALUES)[pairs.int()]
    return torch.ldexp(values, scales.int()[..., None] - BIAS).flatten(-2).transpose(1, 2)
