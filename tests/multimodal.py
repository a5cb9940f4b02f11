"""Small models of text and images, whose language model is one of tiny's families."""

from pathlib import Path

import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

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
    "gemma4": (
        "gemma4_text",
        {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 16,
            "pooling_kernel_size": 2,
        },
        {"video_token_id": 101, "audio_token_id": 102, "boi_token_id": 103, "eoi_token_id": 104},
    ),
    "qwen3_5": ("qwen3_5_text", QWEN, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN, {}),
}


def save(folder: Path, kind: str, **shape) -> torch.nn.Module:
    """A small model of text and images with loud random weights, and a tokenizer; the model is returned.

    `shape` replaces what of tiny's SHAPE the language model has.
    """
    text, vision, more = KINDS[kind]
    of_text = dict({**tiny.FAMILIES, **tiny.MIXTURES}[f] for f in ("gemma4", "qwen3_5", "qwen3_5_moe"))
    own = {
        tiny.ALIASES.get(name, name): value for name, value in of_text.get(text, {}).items() if name != "layer_types"
    }
    config = AutoConfig.for_model(
        kind,
        text_config={
            "model_type": text,
            **tiny.SHAPE,
            **own,
            "num_hidden_layers": 2,
            "head_dim": 8,
            **shape,
        },
        vision_config=vision,
        **({"image_token_index": 100} if "feature_layer" in str(more) or kind == "gemma3" else {"image_token_id": 100}),
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model
