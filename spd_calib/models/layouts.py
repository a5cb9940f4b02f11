"""Reading quantised weights as they lie on disk: from the tensors of each layout to the weight, exactly, in float32.

With s a scale, z a zero point, and q the stored whole number or 8-bit float:

    scaled    weight [out, in] float8 or int8; weight_scale or weight_scale_inv, one, by output or by block: w = q s
    packed    compressed-tensors': weight_packed, 4 or 8 bits along the inputs; weight_scale by group: w = q s
    gptq      qweight packed along the inputs, g_idx the group of each input: w = (q - z) s
    awq       qweight packed along the outputs, eight of them in the order 0 2 4 6 1 3 5 7: w = (q - z) s

MXFP4, of experts' weights alone, is in mxfp4.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .quantised import Layout, Parts

FLOATS = ("F32", "BF16", "F16")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each four bits of a packed number belong to, lowest bits first


def scaled(scale: str, *, numbers: str, block: tuple[int, int] | None) -> Layout:
    """Return the layout of a weight [out, in] of 8-bit numbers with a scale for all, for each output, or each block."""

    def fits(shape: tuple[int, ...], s: tuple[int, ...]) -> bool:
        if block is None:
            return s in ((), (1,), (1, 1), (shape[0],), (shape[0], 1))
        return s == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))

    def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        out, inputs = shapes["weight"]
        if not fits((out, inputs), shapes[scale]):
            raise ValueError
        return out, inputs

    def dequantise(parts: Parts) -> Tensor:
        weight, s = parts["weight"].float(), parts[scale].float()
        if block is not None:
            s = s.repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        elif s.numel() > 1:
            s = s.reshape(-1, 1)
        else:
            s = s.reshape(())
        return weight * s

    extras = ("input_scale", "activation_scale", "input_scale_ub")  # of what the layer reads: not simulated
    dtypes = {"weight": (numbers,), scale: FLOATS, **dict.fromkeys(extras, FLOATS)}
    return Layout(dtypes, frozenset(extras), shape_of, dequantise)


def packed(bits: int) -> Layout:
    """Return compressed-tensors' layout of whole numbers packed along the inputs, stored with 2^(bits - 1) added."""
    per = 32 // bits

    def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        (out, columns), (scaled, groups) = shapes["weight_packed"], shapes["weight_scale"]
        if shapes["weight_shape"] != (2,) or scaled != out or groups < 1:
            raise ValueError
        return out, columns * per

    def dequantise(parts: Parts) -> Tensor:
        out, inputs = (int(n) for n in parts["weight_shape"])
        q = _unpacked(parts["weight_packed"], bits=bits)
        if (out, inputs) != tuple(q.shape):
            raise ValueError(f"weight_shape says {out} x {inputs}, and {q.shape[0]} x {q.shape[1]} numbers are packed")
        scale = parts["weight_scale"].float()
        return (q - 2 ** (bits - 1)).float() * scale.gather(1, _groups(parts.get("weight_g_idx"), scale, inputs=inputs))

    dtypes = {
        "weight_packed": ("I32",),
        "weight_scale": FLOATS,
        "weight_shape": ("I64", "I32"),
        "weight_g_idx": ("I32",),
    }
    return Layout(dtypes, frozenset({"weight_g_idx"}), shape_of, dequantise)


def _groups(g_idx: Tensor | None, scale: Tensor, *, inputs: int) -> Tensor:
    """Return the group of each input for every output, [out, in], of scales [out, groups]."""
    groups = scale.shape[1]
    if g_idx is None or bool((g_idx < 0).all()):
        if inputs % groups:
            raise ValueError(f"{groups} groups of scales do not divide {inputs} inputs")
        g_idx = torch.arange(inputs) // (inputs // groups)
    if g_idx.shape != (inputs,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(f"its group index does not name one of {groups} groups for each of {inputs} inputs")
    return g_idx.long().expand(scale.shape[0], -1)


def gptq(bits: int, *, zero_offset: int) -> Layout:
    """Return GPTQ's layout: qweight [in / per, out], qzeros [groups, out / per], scales [groups, out]."""
    per = 32 // bits

    def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        (rows, out), (groups, columns) = shapes["qweight"], shapes["qzeros"]
        if (
            shapes["scales"] != (groups, out)
            or columns * per != out
            or shapes.get("g_idx", (rows * per,)) != (rows * per,)
        ):
            raise ValueError
        return out, rows * per

    def dequantise(parts: Parts) -> Tensor:
        q = _unpacked(parts["qweight"].T, bits=bits)  # [out, in]
        zero = _unpacked(parts["qzeros"], bits=bits).T + zero_offset  # [out, groups]
        scale = parts["scales"].T.float()
        group = _groups(parts.get("g_idx"), scale, inputs=q.shape[1])
        return (q - zero.gather(1, group)).float() * scale.gather(1, group)

    dtypes = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32",)}
    return Layout(dtypes, frozenset({"g_idx"}), shape_of, dequantise)


def awq() -> Layout:
    """Return AWQ's layout: qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""

    def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        (inputs, columns), (groups, zeros) = shapes["qweight"], shapes["qzeros"]
        if zeros != columns or shapes["scales"] != (groups, columns * 8) or inputs % groups:
            raise ValueError
        return columns * 8, inputs

    def dequantise(parts: Parts) -> Tensor:
        q, zero = (_in_order(_unpacked(parts[name], bits=4)) for name in ("qweight", "qzeros"))  # [in or groups, out]
        size = q.shape[0] // zero.shape[0]
        scale = parts["scales"].float().repeat_interleave(size, 0)
        return ((q - zero.repeat_interleave(size, 0)).float() * scale).T

    dtypes = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}
    return Layout(dtypes, frozenset(), shape_of, dequantise)


def _unpacked(packed: Tensor, *, bits: int) -> Tensor:
    """Return int32 [rows, columns * 32 / bits], the numbers packed in int32 [rows, columns], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def _in_order(numbers: Tensor) -> Tensor:
    """Return the numbers that AWQ packed by eights in AWQ_ORDER in the order of the outputs."""
    place = torch.tensor(AWQ_ORDER).argsort()
    return numbers.unflatten(1, (-1, 8))[..., place].flatten(1)
