"""Quantised checkpoints: which stored tensors together are one weight, and that weight as real numbers.

A weight is measured as what an engine's kernels take it for: dequantised, exactly, to float32. What an engine rounds
besides, the numbers that a layer reads, is not simulated; `Scheme.activations` says so, and every file repeats it.

Layouts, with s a scale, z a zero point, and q the stored whole number or 8-bit float:

    fp8, fbgemm_fp8       weight [out, in] float8, weight_scale or weight_scale_inv: w = q s
    compressed-tensors    weight [out, in] float8 or int8; or weight_packed, 4 or 8 bits, along the inputs: w = q s
    gptq                  qweight packed along the inputs, g_idx the group of each input: w = (q - z) s
    awq                   qweight packed along the outputs, eight of them in the order 0 2 4 6 1 3 5 7: w = (q - z) s
    mxfp4                 experts' weights alone, see mxfp4.py
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_calib.errors import InputError

from . import mxfp4
from .source import Source
from .stored import StoredTensor, opened
from .text_part import whole_of

ORIGINAL = "name the one it was made from, in float32, bfloat16 or float16"
FLOATS = ("F32", "BF16", "F16")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each four bits of a packed number belong to, lowest bits first

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Says how a weight lies in several tensors.

    `dtypes` are those of each part, by the part's suffix, as safetensors spells them. What stands before it, and before
    `separator`, is the name of a module with a `weight`, or of the weight itself.
    """

    dtypes: Mapping[str, tuple[str, ...]]
    optional: frozenset[str]
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]]  # of the weight [out, in], from its parts'
    dequantise: Callable[[Parts], Tensor]  # to float32 [out, in]; raises ValueError for parts that do not fit
    separator: str = "."
    weight: str = ".weight"


@dataclass(frozen=True)
class Scheme:
    """Holds what a configuration says of its quantised weights, in words, and how they lie on disk."""

    method: str
    weights: str
    activations: str  # what an engine rounds to fewer bits beside the weights; empty for nothing
    layout: Layout
    left_alone: tuple[str, ...]  # the modules that are not quantised, as the configuration names them

    @property
    def words(self) -> str:
        """Return the sentence of the scheme that stands in files: what was measured, and what was not."""
        read = f"; measured without what an engine rounds besides: {self.activations}" if self.activations else ""
        return f"{self.method}: {self.weights}, dequantised exactly{read}"

    def leaves_alone(self, module: str) -> bool:
        """Tell whether the configuration says that a module's weight is not quantised."""
        dotted = f".{module}."
        return any(
            re.match(entry.removeprefix("re:"), module)
            if entry.startswith("re:")
            else f".{entry.strip('.')}." in dotted
            for entry in self.left_alone
        )


@dataclass(frozen=True)
class QuantisedTensor:
    """One weight of a checkpoint that several stored tensors make up, by their suffix."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    scheme: Scheme

    def read(self) -> Tensor:
        """Return the whole weight in float32. Raises InputError where its parts hold what the scheme does not allow."""
        with opened({part.file for part in self.parts.values()}) as files:
            tensors = {suffix: files[part.file].get_tensor(part.name) for suffix, part in self.parts.items()}
        try:
            return self.scheme.layout.dequantise(tensors)
        except ValueError as e:
            raise InputError(f"{self.name} cannot be dequantised: {e}; {ORIGINAL}.") from None


Piece = StoredTensor | QuantisedTensor
"""A tensor of a checkpoint, in one stored tensor or in the several of a quantised weight."""


def gathered(source: Source, stored: Mapping[str, StoredTensor], scheme: Scheme) -> dict[str, Piece]:
    """Return the tensors of a quantised checkpoint with each weight's parts as one tensor, under the weight's name.

    Raises InputError for a weight that lacks a part, or has one in a form that the scheme does not have.
    """
    layout = scheme.layout
    own = frozenset(layout.dtypes) - {"weight"}
    split = [name.rpartition(layout.separator) for name in stored]
    modules = dict.fromkeys(module for module, _, suffix in split if suffix in own)
    found: dict[str, Piece] = dict(stored)
    for module in modules:
        parts = {suffix: found.pop(f"{module}{layout.separator}{suffix}", None) for suffix in layout.dtypes}
        held = {suffix: part for suffix, part in parts.items() if isinstance(part, StoredTensor)}
        if lost := sorted(layout.dtypes.keys() - held.keys() - layout.optional):
            raise InputError(
                f"{source.id} lacks {module}{layout.separator}{lost[0]}, without which that weight means nothing; "
                "fetch the model again."
            )
        if odd := [part for suffix, part in held.items() if part.dtype not in layout.dtypes[suffix]]:
            raise InputError(
                f"{source.id} holds {odd[0].name} as {odd[0].dtype}, which its configuration ({scheme.method}) does "
                f"not speak of; {ORIGINAL}."
            )
        try:
            shape = layout.shape({suffix: part.shape for suffix, part in held.items()})
        except (ValueError, IndexError):
            shapes = ", ".join(f"{suffix} {part.shape}" for suffix, part in held.items())
            raise InputError(
                f"{source.id}: the parts of {module} do not fit each other ({shapes}); the folder mixes two models."
            ) from None
        name = f"{module}{layout.weight}"
        if name in found:
            raise InputError(f"{source.id} holds {name} beside its quantised parts; fetch the model again.")
        found[name] = QuantisedTensor(name, shape, held, scheme)
    return found


def scheme_of(config: Any) -> Scheme | None:
    """Return how a configuration says its weights are quantised; None where it does not say so.

    Raises InputError for a scheme that cannot be read exactly.
    """
    folders = whole_of(config)
    said = getattr(folders, "quantization_config", None) or getattr(folders, "compression_config", None)
    if not said:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    method = said.get("quant_method")
    readers = {
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "mxfp4": _mxfp4,
    }
    if method not in readers:
        raise InputError(
            f"This checkpoint is quantised ({method or 'its configuration says so'}), which cannot be read; of those "
            f"that can there are {', '.join(readers)}, or {ORIGINAL}."
        )
    return readers[method](said)


def _unknown(method: str, what: str) -> InputError:
    return InputError(f"This checkpoint is quantised ({method}) with {what}, which cannot be read; {ORIGINAL}.")


def _names(said: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """Return the modules that a configuration leaves unquantised, under whichever of `keys` it lists them."""
    return tuple(name for key in keys for name in said.get(key) or ())


def _fp8(said: dict[str, Any]) -> Scheme:
    method, block = said["quant_method"], said.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(_positive(b) for b in block)):
        raise _unknown(method, f"weight_block_size {block!r}")
    scheme = said.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _unknown(method, f"activation_scheme {scheme!r}")
    scale = "weight_scale_inv" if block else "weight_scale"
    return Scheme(
        method=method,
        weights=f"8-bit floats, a scale for each {block[0]} x {block[1]}" if block else "8-bit floats with a scale",
        activations="what linear layers read, to 8-bit floats",
        layout=_scaled(scale, numbers="F8_E4M3", block=tuple(block) if block else None),
        left_alone=("lm_head", *_names(said, "modules_to_not_convert", "ignored_layers")),
    )


def _compressed_tensors(said: dict[str, Any]) -> Scheme:
    method, form = said["quant_method"], said.get("format")
    groups = list((said.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise _unknown(method, "more than one scheme for its layers")
    if said.get("kv_cache_scheme") or groups[0].get("output_activations") or said.get("sparsity_config"):
        raise _unknown(method, "a quantised KV cache, quantised outputs or sparse weights")
    weights, read = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if not weights.get("symmetric", True) or strategy not in ("tensor", "channel", "group", "block"):
        raise _unknown(method, f"{'a' if weights.get('symmetric', True) else 'an asymmetric'} {strategy} scheme")
    block = weights.get("block_structure") if strategy == "block" else None
    what = f"{bits}-bit {'floats' if kind == 'float' else 'whole numbers'}"
    if form == "pack-quantized" and kind == "int" and bits in (4, 8):
        layout = _packed(bits)
    elif form in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8 and strategy != "group":
        numbers = "F8_E4M3" if kind == "float" else "I8"
        layout = _scaled("weight_scale", numbers=numbers, block=tuple(block) if block else None)
    else:
        raise _unknown(method, f"{what} in the format {form!r}")
    rounded = (
        f"{read.get('num_bits')}-bit {'floats' if read.get('type') == 'float' else 'whole numbers'}" if read else ""
    )
    return Scheme(
        method=method,
        weights=f"{what}, a scale for each {_each(strategy, weights.get('group_size'), block=block)}",
        activations=f"what linear layers read, to {rounded}" if rounded else "",
        layout=layout,
        left_alone=_names(said, "ignore"),
    )


def _each(strategy: str, group_size: int | None, *, block: list[int] | None) -> str:
    """Return what has a scale of its own, in words."""
    if block:
        return f"{block[0]} x {block[1]}"
    return f"{group_size} inputs of an output" if strategy == "group" else {"channel": "output"}.get(strategy, strategy)


def _gptq(said: dict[str, Any]) -> Scheme:
    bits, form = said.get("bits"), said.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2") or said.get("dynamic") or said.get("is_marlin_format"):
        raise _unknown("gptq", f"{bits} bits in the format {form!r}, or settings of its own for some layers")
    return Scheme(
        method="gptq",
        weights=f"{bits}-bit whole numbers, a scale for each {said.get('group_size')} inputs of an output",
        activations="",
        layout=_gptq_layout(bits, zero_offset=1 if form == "gptq" else 0),  # version 1 stores each zero point less one
        left_alone=() if said.get("lm_head") else ("lm_head",),
    )


def _awq(said: dict[str, Any]) -> Scheme:
    bits, version = said.get("bits", said.get("w_bit")), str(said.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise _unknown("awq", f"{bits} bits in the version {version!r}")
    group = said.get("group_size", said.get("q_group_size"))
    return Scheme(
        method="awq",
        weights=f"4-bit whole numbers, a scale for each {group} inputs of an output",
        activations="",
        layout=_awq_layout(),
        left_alone=("lm_head", *_names(said, "modules_to_not_convert")),
    )


def _mxfp4(said: dict[str, Any]) -> Scheme:
    bytes_alone = {"blocks": ("U8",), "scales": ("U8",)}
    return Scheme(
        method="mxfp4",
        weights="experts in 4-bit floats, a power of two for each 32 inputs of an output",
        activations="",
        layout=Layout(bytes_alone, frozenset(), mxfp4.shape, mxfp4.dequantise, separator="_", weight=""),
        left_alone=("re:.*",),  # no linear layer is quantised, and experts are none
    )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _scaled(scale: str, *, numbers: str, block: tuple[int, int] | None) -> Layout:
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


def _packed(bits: int) -> Layout:
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


def _gptq_layout(bits: int, *, zero_offset: int) -> Layout:
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


def _awq_layout() -> Layout:
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
