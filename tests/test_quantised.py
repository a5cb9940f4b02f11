"""Quantised checkpoints: the weights that a naive loop takes out of the bits, in every loader; all else is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from owned import owned
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.models.load import check_config, checked_fingerprint, load_dense, locate, model_ref, read_config
from spd_calib.models.shard_load import load_sharded, own_slices
from spd_calib.models.stream_load import load_streamed

SINGLE = "model.safetensors"
GROUP = 16
Parts = dict[str, Tensor]
Quantise = Callable[[Tensor], tuple[Parts, Tensor]]


def packed(numbers: list[list[int]], bits: int, order: list[int] | None = None) -> Tensor:
    """Rows of whole numbers, 32 / bits to an int32: number order[i] of each pack in its i-th bits from below."""
    per = 32 // bits
    order = order or list(range(per))
    rows = []
    for row in numbers:
        words = []
        for start in range(0, len(row), per):
            word = sum(row[start + order[i]] << (bits * i) for i in range(per))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


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


def compressed(w: Tensor) -> tuple[Parts, Tensor]:
    g_idx = [i // GROUP for i in range(w.shape[1])]
    q, scales, zeros = grouped(w, g_idx, least=-8, most=7, offset=False)
    parts = {
        "weight_packed": packed((q.int() + 8).tolist(), 4),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor(w.shape),
    }
    return parts, by_element(q, scales, zeros, g_idx)


def gptq(bits: int, *, ordered: bool) -> Quantise:
    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        inputs = w.shape[1]
        g_idx = [(i if ordered else (i * 7) % inputs) // GROUP for i in range(inputs)]
        q, scales, zeros = grouped(w, g_idx, least=0, most=2**bits - 1, offset=True)
        parts = {
            "qweight": packed(q.int().tolist(), bits).T,
            "qzeros": packed((zeros.T.int() - 1).tolist(), bits),
            "scales": scales.T.half(),
            "g_idx": torch.tensor(g_idx, dtype=torch.int32),
        }
        return parts, by_element(q, scales, zeros, g_idx)

    return quantise


def awq(w: Tensor) -> tuple[Parts, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    g_idx = [i // GROUP for i in range(w.shape[1])]
    q, scales, zeros = grouped(w, g_idx, least=0, most=15, offset=True)
    parts = {
        "qweight": packed(q.T.int().tolist(), 4, order),
        "qzeros": packed(zeros.T.int().tolist(), 4, order),
        "scales": scales.T.half(),
    }
    return parts, by_element(q, scales, zeros, g_idx)


def of_compressed_tensors(form: str, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


SCHEMES: dict[str, tuple[dict, Quantise]] = {
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [24, 24], "activation_scheme": "dynamic"},
        float8(24, "weight_scale_inv"),
    ),
    "fp8 with one scale": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, float8(None, "weight_scale")),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, float8(None, "weight_scale", per_output=True)),
    "compressed float8": (
        of_compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
        float8(None, "weight_scale", per_output=True),
    ),
    "compressed int8": (of_compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"), int8),
    "compressed w4a16": (
        of_compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
        compressed,
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, gptq(4, ordered=True)),
    "gptq by activation": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP}, gptq(8, ordered=False)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
}


def quantise(folder: Path, scheme: str) -> dict[str, Tensor]:
    """Quantise the linear layers of a folder's blocks; return all its weights as a loop takes them back."""
    said, of = SCHEMES[scheme]
    stored, real = {}, {}
    for name, w in load_file(folder / SINGLE).items():
        if w.dim() == 2 and ".layers." in name:
            parts, real[name] = of(w)
            stored |= {f"{name.removesuffix('weight')}{suffix}": t.contiguous() for suffix, t in parts.items()}
        else:
            stored[name] = real[name] = w
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return real


def make(folder: Path, scheme: str) -> dict[str, Tensor]:
    tiny.save(tiny.build("llama", layers=2), folder)
    return quantise(folder, scheme)


def mxfp4(folder: Path) -> dict[str, Tensor]:
    """Give a folder of GPT-OSS random experts in MXFP4; return all its weights as a loop takes them back."""
    positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    generator = torch.Generator().manual_seed(0)
    stored, real = {}, {}
    for name, w in load_file(folder / SINGLE).items():
        if w.dim() != 3:
            stored[name] = real[name] = w
            continue
        experts, inputs, out = w.shape
        blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        real[name] = torch.empty(w.shape)
        for e in range(experts):
            for o in range(out):
                for i in range(inputs):
                    byte = int(blocks[e, o, i // 32, i % 32 // 2])
                    four = byte >> 4 if i % 2 else byte & 15
                    value = -positive[four - 8] if four > 7 else positive[four]
                    real[name][e, i, o] = value * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return real


def test_mxfp4_is_what_a_loop_takes_out_of_the_bits_in_every_loader(tmp_path):
    tiny.save(tiny.build("gpt_oss", layers=2), tmp_path)
    in_every_loader(tmp_path, mxfp4(tmp_path))
    stored = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file({n: t for n, t in stored.items() if n != name}, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks {name}"):
        checked_fingerprint(locate(str(tmp_path)), read_config(locate(str(tmp_path))))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_what_a_loop_takes_out_of_the_bits_in_every_loader(scheme, tmp_path):
    in_every_loader(tmp_path, make(tmp_path, scheme))


def in_every_loader(folder: Path, real: dict[str, Tensor]) -> None:
    source = locate(str(folder))
    config = read_config(source)
    check_config(config, 2)
    dense = load_dense(source, config, device="cpu", dtype="float32")
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(weight, real[name], rtol=2e-7, atol=0)
    streamed, weights = load_streamed(source, config, device="cpu", dtype="float32")
    for block in range(2):
        weights.hold(block)
        for name, weight in streamed.state_dict().items():
            if f".layers.{block}." in name:
                assert torch.equal(weight, dense.state_dict()[name])
    for rank in range(2):
        shard = load_sharded(source, config, rank=rank, tp=2, device="cpu", dtype="float32")
        own = own_slices(dense, rank=rank, tp=2)
        for name, weight in shard.state_dict().items():
            assert torch.equal(weight, owned(dense.state_dict()[name], *own.get(name, ())))
    assert re.match(r"[\w-]+: .* dequantised exactly", model_ref(source, config).quantised)


def test_a_profile_is_that_of_the_weights_dequantised_by_hand(spd, text, tmp_path):
    found = []
    for name in ("quantised", "by_hand"):
        tiny.save(tiny.build("llama", layers=2), folder := tmp_path / name)
        real = quantise(folder, "fp8 in blocks")
        if name == "by_hand":
            save_file(real, folder / SINGLE, metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            del config["quantization_config"]
            (folder / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"{name}.json"
        assert spd("profile", folder, "--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 6,
                   "--verify-samples", 2, "--device", "cpu", "--dtype", "float32", "-o", out).code == 0  # fmt: skip
        found.append(json.loads(out.read_text()))
    quantised, by_hand = found
    assert quantised["measurements"] == by_hand["measurements"]
    assert "8-bit floats, a scale for each 24 x 24" in quantised["model"]["quantised"]
    assert "quantised" not in by_hand["model"]


def without(suffix: str) -> Callable[[Parts], Parts]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(f"layers.1.mlp.up_proj.{suffix}")}


def changed(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Parts], Parts]:
    return lambda tensors: {
        n: value(t) if n.endswith(f"layers.1.mlp.up_proj.{name}") else t for n, t in tensors.items()
    }


BROKEN: dict[str, tuple[str, Callable[[Parts], Parts], str]] = {
    "no scale": ("fp8 in blocks", without("weight_scale_inv"), "up_proj.weight as F8_E4M3 without"),
    "no numbers": ("fp8 in blocks", without("weight"), "lacks model.layers.1.mlp.up_proj.weight"),
    "no zero points": ("gptq", without("qzeros"), "lacks model.layers.1.mlp.up_proj.qzeros"),
    "other scales": ("awq", changed("scales", lambda t: t[:1]), "do not fit each other"),
    "other numbers": ("gptq", changed("scales", lambda t: t.int()), "as I32"),
    "a wrong group": ("gptq by activation", changed("g_idx", lambda t: t + 1), "group index"),
    "a wrong shape": ("compressed w4a16", changed("weight_shape", lambda t: t - 1), "weight_shape says"),
    "not a number": ("fp8 with one scale", changed("weight_scale", lambda t: t * torch.nan), "NaN or Inf"),
    "one not quantised": (
        "awq",
        lambda tensors: {
            **{n: t for n, t in tensors.items() if "1.mlp.up_proj" not in n},
            "model.layers.1.mlp.up_proj.weight": torch.ones(128, 64),
        },
        "says that it is quantised",
    ),
    "a weight beside": (
        "awq",
        lambda tensors: {**tensors, "model.layers.1.mlp.up_proj.weight": torch.ones(128, 64)},
        "beside its quantised parts",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_parts_that_do_not_make_a_weight_are_refused(what, tmp_path):
    scheme, change, words = BROKEN[what]
    make(tmp_path, scheme)
    tensors = {n: t.contiguous() for n, t in change(load_file(tmp_path / SINGLE)).items()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    source = locate(str(tmp_path))
    with pytest.raises(InputError, match=words):
        load_dense(source, read_config(source), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"quantised \(bitsandbytes\)"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm_head": {}}}, "of its own for some layers"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        (of_compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", symmetric=False), "asymm"),
        (of_compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float", strategy="group"), "4-bit floats"),
        ({**of_compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"),
          "kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
    ],
)  # fmt: skip
def test_a_scheme_that_cannot_be_read_exactly_is_refused(said, words, tmp_path):
    tiny.save(tiny.build("llama", layers=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(InputError, match=words):
        check_config(read_config(locate(str(tmp_path))), 2)


def test_what_a_configuration_leaves_alone_may_not_be_quantised(tmp_path):
    make(tmp_path, "awq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["mlp"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = locate(str(tmp_path))
    with pytest.raises(InputError, match=r"(up|gate)_proj quantised"):
        checked_fingerprint(source, read_config(source))
