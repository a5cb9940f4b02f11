"""Quantised checkpoints: the weights that a naive loop takes out of the bits, in every loader; all else is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from owned import owned
from quantised_copies import SCHEMES, SINGLE, Parts, by_hand, of_compressed_tensors, quantise
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_calib import RunOptions, TextSelection, check, plan, profile
from spd_calib.demo.assets import model_dir
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import dumps
from spd_calib.formats.profile import Profile
from spd_calib.models.load import check_config, checked_fingerprint, load_dense, locate, model_ref, read_config
from spd_calib.models.shard_load import load_sharded, own_slices
from spd_calib.models.stream_load import load_streamed

SHARED = Path(__file__).parents[2] / "shared"


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


def trained() -> list:
    """Models that were trained, their schemes, and what a scheme leaves alone of them.

    stories260k's 172 neurons cannot be packed by eights, and GPTQ has no way to leave a layer out.
    """
    stories = SHARED / "models/stories260k"
    here = pytest.mark.skipif(not stories.is_dir(), reason="../shared/models/stories260k is not here")
    alone = {"compressed w4a16": ["mlp"], "awq": ["mlp"]}
    demo = [pytest.param(model_dir(), scheme, [], id=f"demo-{scheme}") for scheme in SCHEMES]
    return demo + [
        pytest.param(stories, scheme, alone.get(scheme, []), id=f"stories260k-{scheme}", marks=here)
        for scheme in SCHEMES
        if scheme != "gptq"
    ]


@pytest.mark.parametrize(("folder", "scheme", "alone"), trained())
def test_a_profile_is_that_of_the_weights_dequantised_by_hand(folder, scheme, alone, tmp_path):
    """KL per block of each strategy within 2 %."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    real = quantise(copy, scheme, group=32, block=128, alone=alone)
    quantised = profiled(copy)
    by_hand(copy, real)
    rows = profiled(copy)
    assert "dequantised exactly" in quantised.model.quantised and rows.model.quantised is None
    for row, expected in zip(quantised.measurements, rows.measurements, strict=True):
        assert (row.block, row.strategy) == (expected.block, expected.strategy)
        assert expected.kl > 1e-6 and row.kl == pytest.approx(expected.kl, rel=0.02)


def profiled(folder: Path, *, tp: int = 4, data: Path | str = "demo") -> Profile:
    few = TextSelection(seq_len=48, max_samples=4, verify_samples=2)
    return profile(
        str(folder),
        tp=tp,
        data=str(data),
        text=few,
        strategies=["block_drop"],
        run=RunOptions(device="cpu", dtype="float32"),
    )


def test_a_plan_for_a_quantised_copy_is_verified_on_the_copy(llama, text, tmp_path):
    """It names both models, costs what a plan made from the copy's own profile costs, and is of the copy alone."""
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    quantise(copy, "fp8 in blocks")
    original, of_copy = (profiled(folder, tp=2, data=text) for folder in (llama, copy))
    cpu = RunOptions(device="cpu")
    planned, expected = (plan(p, drop="100%", model=str(copy), run=cpu) for p in (original, of_copy))
    assert (planned.model, planned.profiled) == (of_copy.model.model_copy(update={"id": str(copy)}), original.model)
    assert planned.verified == expected.verified and expected.profiled is None
    assert planned.verified != plan(original, drop="100%", run=cpu).verified
    path = tmp_path / "plan.json"
    path.write_text(dumps(planned))
    assert check(path).ok
    with pytest.raises(InputError, match="check the engine that you serve, with `as_served`"):
        check(path, runtime="vllm")
    with pytest.raises(SpdError, match="the configuration differs"):
        check(path, model=str(llama))
    with pytest.raises(InputError, match="the configuration differs"):
        plan(of_copy, drop=1, model=str(llama), run=cpu)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match="the configuration differs"):
        plan(original, drop=1, model=str(copy), run=cpu)


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
