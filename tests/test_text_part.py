"""The language model inside a model of text and images: every logit as the whole gives it for text alone."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from spd_calib.errors import InputError
from spd_calib.models.load import load_dense, locate, read_config
from spd_calib.models.shard_load import load_sharded
from spd_calib.models.text_part import WITH_TEXT_PART
from spd_calib.parallel.session import open_session

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
PIXTRAL = {**CLIP, "model_type": "pixtral", "head_dim": 16}
QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
        "patch_size": 8, "spatial_merge_size": 2, "num_position_embeddings": 16}  # fmt: skip
KINDS: dict[str, tuple[str, dict, dict]] = {
    "llava": ("llama", CLIP, {"vision_feature_layer": -1}),
    "vipllava": ("llama", CLIP, {"vision_feature_layers": [-1]}),
    "llava_next": ("mistral", CLIP, {"vision_feature_layer": -1}),
    "llava_onevision": ("qwen2", SIGLIP, {"vision_feature_layer": -1}),
    "internvl": (
        "qwen2",
        {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [8, 8],
        },
        {"downsample_ratio": 0.5},
    ),
    "gemma3": ("gemma3_text", SIGLIP, {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", PIXTRAL, {"vision_feature_layer": -1}),
    "qwen3_5": ("qwen3_5_text", QWEN, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN, {}),
}


def save(folder: Path, kind: str) -> torch.nn.Module:
    """A small model of text and images with loud random weights, and a tokenizer; the model is returned."""
    text, vision, more = KINDS[kind]
    of_text = dict(tiny.FAMILIES[f] if f in tiny.FAMILIES else tiny.MIXTURES[f] for f in ("qwen3_5", "qwen3_5_moe"))
    config = AutoConfig.for_model(
        kind,
        text_config={"model_type": text, **tiny.SHAPE, **of_text.get(text, {}), "num_hidden_layers": 2, "head_dim": 8},
        vision_config=vision,
        **({"image_token_index": 100} if "feature_layer" in str(more) or kind == "gemma3" else {"image_token_id": 100}),
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_read_as_the_whole_model_reads_it(kind, tmp_path):
    whole = save(tmp_path, kind)
    assert type(whole).__name__ in WITH_TEXT_PART
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    source = locate(str(tmp_path))
    dense = load_dense(source, read_config(source), device="cpu", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    for stream in (False, True):
        session = open_session(str(tmp_path), 2)
        lm = session.load("cpu", "float32", stream=stream)
        torch.testing.assert_close(lm(ids), expected, rtol=1e-5, atol=1e-4)
    load_sharded(source, read_config(source), rank=1, tp=2, device="cpu", dtype="float32")
    assert session.ref.architecture == type(whole).__name__ and session.ref.num_blocks == 2


def test_the_weights_of_every_part_are_accounted_for(tmp_path):
    save(tmp_path, "llava")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(n for n in tensors if "vision" in n)
    save_file({n: t for n, t in tensors.items() if n != lost}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack .*vision"):
        open_session(str(tmp_path), 2)


def test_a_class_that_does_more_to_text_is_refused(tmp_path):
    AutoConfig.for_model("paligemma").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="what it does to text beside its language model"):
        open_session(str(tmp_path), 2)


def test_the_profile_names_the_whole_model(spd, text, tmp_path):
    save(folder := tmp_path / "model", "mistral3")
    outcome = spd("profile", folder, "--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 4,
                  "--verify-samples", 2, "--device", "cpu", "-o", tmp_path / "p.json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "p.json").read_text())["model"]["architecture"] == "Mistral3ForConditionalGeneration"
