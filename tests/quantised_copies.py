"""Copies of a model folder in the schemes that people quantise by, and the weights that a loop takes back out of each.

Nothing here knows `spd_calib`: the numbers are quantised, packed and taken back by hand.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SINGLE = "model.safetensors"
Parts = dict[str, Tensor]
Quantise = Callable[[Tensor], tuple[Parts, Tensor]]


def packed(numbers: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Rows of whole numbers, 32 / bits to an int32: number order[i] of each pack in its i-th bits from below."""
    per = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // per, dtype=torch.int64)
    for i, place in enumerate(order or range(per)):
        words += numbers.long()[:, place::per] * 2 ** (bits * i)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def float8(block: int | None, name: str, per_output: bool = False) -> Quantise:
    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        out, inputs = w.shape
        rows, columns = (block, block) if block else (1, inputs) if per_output else (out, inputs)
        q, real = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty_like(w)
        scales = []
        for i in range(0, out, rows):
            scales.append([])
            for j in range(0, inputs, columns):
                cell = (slice(i, i + rows), slice(j, j + columns))
                scale = w[cell].abs().max() / 448
                q[cell] = (w[cell] / scale).to(torch.float8_e4m3fn)
                real[cell] = q[cell].float() * scale
                scales[-1].append(scale)
        s = torch.tensor(scales)
        return {"weight": q, name: s if block or per_output else s.reshape(())}, real

    return quantise


def int8(w: Tensor) -> tuple[Parts, Tensor]:
    scale = (w.abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (w / scale.float()).round().clamp(-128, 127)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale.float()


def grouped(w: Tensor, g_idx: list[int], *, least: int, most: int, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers [out, in], scales and zero points [out, groups] for groups of inputs."""
    groups = torch.tensor(g_idx)
    scales, zeros = torch.empty(len(w), max(g_idx) + 1), torch.zeros(len(w), max(g_idx) + 1)
    q = torch.empty_like(w)
    for g in range(max(g_idx) + 1):
        of = w[:, groups == g]
        low, high = (of.amin(1), of.amax(1)) if offset else (-of.abs().amax(1), of.abs().amax(1))
        scales[:, g] = ((high - low) / (most - least)).half().float()
        zeros[:, g] = (least - low / scales[:, g]).round().clamp(1, most) if offset else 0
        q[:, groups == g] = (of / scales[:, g : g + 1] + zeros[:, g : g + 1]).round().clamp(least, most)
    return q, scales, zeros


def by_element(q: Tensor, scales: Tensor, zeros: Tensor, g_idx: list[int]) -> Tensor:
    real = torch.empty(q.shape)
    for column, g in enumerate(g_idx):
        real[:, column] = (q[:, column] - zeros[:, g]) * scales[:, g]
    return real


def compressed(group: int) -> Quantise:
    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        g_idx = [i // group for i in range(w.shape[1])]
        q, scales, zeros = grouped(w, g_idx, least=-8, most=7, offset=False)
        parts = {
            "weight_packed": packed(q + 8, 4),
            "weight_scale": scales.half(),
            "weight_shape": torch.tensor(w.shape),
        }
        return parts, by_element(q, scales, zeros, g_idx)

    return quantise


def gptq(bits: int, group: int, *, ordered: bool, symmetric: bool) -> Quantise:
    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        inputs = w.shape[1]
        g_idx = [(i if ordered else (i * 7) % inputs) // group for i in range(inputs)]
        middle = 2 ** (bits - 1)
        if symmetric:
            q, scales, zeros = grouped(w, g_idx, least=-middle, most=middle - 1, offset=False)
            q, zeros = q + middle, zeros + middle
        else:
            q, scales, zeros = grouped(w, g_idx, least=0, most=2 * middle - 1, offset=True)
        parts = {
            "qweight": packed(q, bits).T,
            "qzeros": packed(zeros.T - 1, bits),
            "scales": scales.T.half(),
            "g_idx": torch.tensor(g_idx, dtype=torch.int32),
        }
        return parts, by_element(q, scales, zeros, g_idx)

    return quantise


def awq(group: int) -> Quantise:
    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        g_idx = [i // group for i in range(w.shape[1])]
        q, scales, zeros = grouped(w, g_idx, least=0, most=15, offset=True)
        parts = {"qweight": packed(q.T, 4, order), "qzeros": packed(zeros.T, 4, order), "scales": scales.T.half()}
        return parts, by_element(q, scales, zeros, g_idx)

    return quantise


def of_compressed_tensors(form: str, *, read: dict | None = None, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": read}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


BY_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
SCHEMES = (
    "fp8 in blocks",
    "fp8 with one scale",
    "fbgemm",
    "compressed float8",
    "compressed int8",
    "compressed w4a16",
    "gptq",
    "gptq by activation",
    "awq",
)


def scheme_of(name: str, *, group: int, block: int) -> tuple[dict, Quantise]:
    """What the configuration says of one of SCHEMES, and what quantises a weight: by `group` inputs, in blocks."""
    by_group = {"bits": 4, "group_size": group}
    return {
        "fp8 in blocks": (
            {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"},
            float8(block, "weight_scale_inv"),
        ),
        "fp8 with one scale": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, float8(None, "weight_scale")),
        "fbgemm": (
            {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
            float8(None, "weight_scale", per_output=True),
        ),
        "compressed float8": (
            of_compressed_tensors(
                "float-quantized", num_bits=8, type="float", strategy="channel", read={**BY_TOKEN, "type": "float"}
            ),
            float8(None, "weight_scale", per_output=True),
        ),
        "compressed int8": (
            of_compressed_tensors(
                "int-quantized", num_bits=8, type="int", strategy="channel", read={**BY_TOKEN, "type": "int"}
            ),
            int8,
        ),
        "compressed w4a16": (
            of_compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=group),
            compressed(group),
        ),
        "gptq": (
            {"quant_method": "gptq", "desc_act": False, "sym": True, **by_group},
            gptq(4, group, ordered=True, symmetric=True),
        ),
        "gptq by activation": (
            {"quant_method": "gptq", "desc_act": True, "sym": False, **by_group, "bits": 8},
            gptq(8, group, ordered=False, symmetric=False),
        ),
        "awq": ({"quant_method": "awq", "version": "gemm", "zero_point": True, **by_group}, awq(group)),
    }[name]


def quantise(
    folder: Path, scheme: str, *, group: int = 16, block: int = 24, alone: Collection[str] = ()
) -> dict[str, Tensor]:
    """Quantise the linear layers of a folder's blocks; return all its weights as a loop takes them back.

    Modules whose name holds one of `alone` are left as they are.
    """
    said, of = scheme_of(scheme, group=group, block=block)
    stored, real = {}, {}
    for name, w in load_file(folder / SINGLE).items():
        if w.dim() == 2 and ".layers." in name and not any(part in name for part in alone):
            parts, real[name] = of(w)
            stored |= {f"{name.removesuffix('weight')}{suffix}": t.contiguous() for suffix, t in parts.items()}
        else:
            stored[name] = real[name] = w
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    if said["quant_method"] == "compressed-tensors":
        said = {**said, "ignore": ["lm_head", *(f"re:.*{part}.*" for part in alone)]}
    elif alone:
        said = {**said, "modules_to_not_convert": ["lm_head", *alone]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return real


def by_hand(folder: Path, real: dict[str, Tensor]) -> None:
    """Make a quantised folder the same model in float32, of the weights that `quantise` returned."""
    save_file(real, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
