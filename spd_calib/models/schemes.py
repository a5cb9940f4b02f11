"""Finding the scheme of quantised weights in a configuration, or the sentence why they cannot be read exactly."""

from typing import Any

from spd_calib.errors import InputError

from . import layouts, mxfp4
from .quantised import ORIGINAL, Layout, Reads, Scheme
from .text_part import whole_of

SAID_IN = ("quantization_config", "compression_config")
"""The fields of a configuration that may say how its weights are quantised."""


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what it says of quantised weights."""
    return {key: value for key, value in config.items() if key not in SAID_IN}


def scheme_of(config: Any) -> Scheme | None:
    """Return how a configuration says its weights are quantised; None where it does not say so.

    Raises InputError for a scheme that cannot be read exactly.
    """
    folders = whole_of(config)
    said = next((said for key in SAID_IN if (said := getattr(folders, key, None))), None)
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
        reads="8-bit floats",
        layout=layouts.scaled(scale, numbers="F8_E4M3", block=tuple(block) if block else None),
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
        layout = layouts.packed(bits)
    elif form in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8 and strategy != "group":
        numbers = "F8_E4M3" if kind == "float" else "I8"
        layout = layouts.scaled("weight_scale", numbers=numbers, block=tuple(block) if block else None)
    else:
        raise _unknown(method, f"{what} in the format {form!r}")
    return Scheme(
        method=method,
        weights=f"{what}, a scale for each {_each(strategy, weights.get('group_size'), block=block)}",
        reads=_reads(read) if read else "",
        layout=layout,
        left_alone=_names(said, "ignore"),
    )


def _reads(said: dict[str, Any]) -> Reads:
    """Return what a compressed-tensors configuration says that linear layers read."""
    bits, kind = said.get("num_bits"), said.get("type")
    if bits != 8 or kind not in ("float", "int"):
        raise _unknown("compressed-tensors", f"inputs in {bits}-bit {kind}")
    return "8-bit floats" if kind == "float" else "8-bit whole numbers"


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
        reads="",
        layout=layouts.gptq(bits, zero_offset=1 if form == "gptq" else 0),  # version 1 stores each zero point less one
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
        reads="",
        layout=layouts.awq(),
        left_alone=("lm_head", *_names(said, "modules_to_not_convert")),
    )


def _mxfp4(said: dict[str, Any]) -> Scheme:
    bytes_alone = {"blocks": ("U8",), "scales": ("U8",)}
    return Scheme(
        method="mxfp4",
        weights="experts in 4-bit floats, a power of two for each 32 inputs of an output",
        reads="",
        layout=Layout(bytes_alone, frozenset(), mxfp4.shape, mxfp4.dequantise, separator="_", weight=""),
        left_alone=("re:.*",),  # no linear layer is quantised, and experts are none
    )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
