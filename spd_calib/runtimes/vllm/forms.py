"""The list of vLLM's decoder layers that can drop their sync points: a row an architecture.

Names say nothing about what a layer computes (Gemma2 looks like Llama), so the list is of vLLM's own classes; where
vLLM runs transformers' own layers, it is of the architectures that were tested.
"""

from collections.abc import Callable
from typing import Any

from .forwards import deepseek, fused, gpt_oss, granite, opt, unfused, with_unused_residual
from .layer_form import LayerForm
from .norm_forwards import behind_norms, sandwich, stream_alone

BACKEND = "TransformersForCausalLM"
"""vLLM's class for models whose layers are transformers' own."""


def _form(model: str, layer: str, planned: Callable[..., Callable], **names: Any) -> LayerForm:
    """Return the form of classes of vLLM's own, given by their places below vllm.model_executor.models."""
    return LayerForm(f"vllm.model_executor.models.{model}", f"vllm.model_executor.models.{layer}", planned, **names)


def _every_second_slides(config: Any) -> list[str]:
    """Return the kinds of GPT-OSS's layers: vLLM gives every second one, from the first on, a window."""
    return [("sliding_attention", "full_attention")[i % 2] for i in range(config.num_hidden_layers)]


def _choice_by_groups(config: Any) -> str:
    """Return the name of how vLLM chooses DeepSeek V2's experts: by the best of each group, where there are several."""
    return "greedy" if config.n_group == 1 else "group_limited_greedy"


FORMS = {
    "LlamaForCausalLM": _form("llama.LlamaForCausalLM", "llama.LlamaDecoderLayer", fused),
    "Ernie4_5ForCausalLM": _form(
        "ernie45.Ernie4_5ForCausalLM", "llama.LlamaDecoderLayer", fused, configured=(("use_bias", False),)
    ),
    "Phi3ForCausalLM": _form("phi3.Phi3ForCausalLM", "llama.LlamaDecoderLayer", fused),
    "MistralForCausalLM": _form(
        "mistral.MistralForCausalLM",
        "mistral.MistralDecoderLayer",
        fused,
        switches=(("ada_rms_norm_t_cond", None),),
    ),
    "Qwen2ForCausalLM": _form("qwen2.Qwen2ForCausalLM", "qwen2.Qwen2DecoderLayer", fused),
    "Qwen3ForCausalLM": _form("qwen3.Qwen3ForCausalLM", "qwen3.Qwen3DecoderLayer", fused),
    "MixtralForCausalLM": _form(
        "mixtral.MixtralForCausalLM", "mixtral.MixtralDecoderLayer", fused, mixture="block_sparse_moe"
    ),
    "Qwen2MoeForCausalLM": _form(
        "qwen2_moe.Qwen2MoeForCausalLM", "qwen2_moe.Qwen2MoeDecoderLayer", fused, mixture="mlp"
    ),
    "Qwen3MoeForCausalLM": _form(
        "qwen3_moe.Qwen3MoeForCausalLM", "qwen3_moe.Qwen3MoeDecoderLayer", fused, mixture="mlp"
    ),
    "OlmoeForCausalLM": _form(
        "olmoe.OlmoeForCausalLM",
        "olmoe.OlmoeDecoderLayer",
        fused,
        mixture="mlp",
        configured=(("rms_norm_eps", 1e-5), ("clip_qkv", None)),
    ),
    "GraniteMoeForCausalLM": _form(
        "granitemoe.GraniteMoeForCausalLM",
        "granitemoe.GraniteMoeDecoderLayer",
        unfused(granite),
        mixture="block_sparse_moe",
        scale="residual_multiplier",
    ),
    "Glm4MoeForCausalLM": _form("glm4_moe.Glm4MoeForCausalLM", "glm4_moe.Glm4MoeDecoderLayer", fused, mixture="mlp"),
    "Ernie4_5_MoeForCausalLM": _form(
        "ernie45_moe.Ernie4_5_MoeForCausalLM",
        "ernie45_moe.Ernie4_5_MoeDecoderLayer",
        fused,
        mixture="mlp",
        configured=(("use_bias", False),),
    ),
    "GptOssForCausalLM": _form(
        "gpt_oss.GptOssForCausalLM",
        "gpt_oss.TransformerBlock",
        gpt_oss,
        o="attn.o_proj",
        mixture="mlp",
        gate="router",
        configured=(
            ("rms_norm_eps", 1e-5),
            ("swiglu_alpha", 1.702),
            ("swiglu_limit", 7.0),
            ("attention_bias", True),
            ("layer_types", _every_second_slides),
        ),
    ),
    "DeepseekV2ForCausalLM": _form(
        "deepseek_v2.DeepseekV2ForCausalLM",
        "deepseek_v2.DeepseekV2DecoderLayer",
        deepseek,
        mixture="mlp",
        configured=(
            ("attention_bias", False),
            ("mlp_bias", False),
            ("rms_norm_eps", 1e-6),
            ("topk_method", _choice_by_groups),
        ),
        routers=(("scoring_func", "softmax"), ("renormalize", False)),
    ),
    "DeepseekV3ForCausalLM": _form(
        "deepseek_v2.DeepseekV3ForCausalLM",
        "deepseek_v2.DeepseekV2DecoderLayer",
        deepseek,
        mixture="mlp",
        configured=(("attention_bias", False), ("rms_norm_eps", 1e-6)),
        routers=(("scoring_func", "sigmoid"),),
    ),
    **{
        f"{name}ForCausalLM": _form(
            f"{module}.{name}ForCausalLM",
            f"{module}.{layer}DecoderLayer",
            fused,
            linear_o="linear_attn.out_proj",
            mixture="" if name == "Qwen3_5" else "mlp",
            switches=(("layer_scale", False), ("use_attn_reduce_scatter_for_moe", False)),
        )
        for name, module, layer in (
            ("Qwen3_5", "qwen3_5", "Qwen3_5"),
            ("Qwen3_5Moe", "qwen3_5", "Qwen3_5"),
            ("Qwen3Next", "qwen3_next", "Qwen3Next"),
        )
    },
    "GemmaForCausalLM": _form("gemma.GemmaForCausalLM", "gemma.GemmaDecoderLayer", fused),
    "NemotronForCausalLM": _form("nemotron.NemotronForCausalLM", "nemotron.NemotronDecoderLayer", fused),
    "GraniteForCausalLM": _form(
        "granite.GraniteForCausalLM", "granite.GraniteDecoderLayer", unfused(granite), scale="residual_multiplier"
    ),
    "HyperCLOVAXForCausalLM": _form(
        "hyperclovax.HyperCLOVAXForCausalLM",
        "hyperclovax.HyperCLOVAXDecoderLayer",
        unfused(with_unused_residual),
        scale="residual_multiplier",
        switches=(("use_post_norm", False),),
    ),
    "StableLmForCausalLM": _form(
        "stablelm.StablelmForCausalLM", "stablelm.StablelmDecoderLayer", unfused(with_unused_residual)
    ),
    **{
        f"{name}ForCausalLM": _form(
            f"{module}.{name}ForCausalLM",
            f"{module}.{name}DecoderLayer",
            behind_norms(sandwich),
            attention_out_norm="post_attention_layernorm",
            norm2="pre_feedforward_layernorm",
            mlp_out_norm="post_feedforward_layernorm",
        )
        for name, module in (("Gemma2", "gemma2"), ("Gemma3", "gemma3"))
    },
    "Gemma4ForCausalLM": _form(
        "gemma4.Gemma4ForCausalLM",
        "gemma4.Gemma4DecoderLayer",
        behind_norms(stream_alone),
        attention_out_norm="post_attention_layernorm",
        norm2="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
        stream_scale="layer_scalar",
        switches=(("enable_moe_block", False), ("per_layer_input_gate", None)),
    ),
    "Glm4ForCausalLM": _form(
        "glm4.Glm4ForCausalLM",
        "glm4.Glm4DecoderLayer",
        behind_norms(sandwich),
        attention_out_norm="post_self_attn_layernorm",
        mlp_out_norm="post_mlp_layernorm",
    ),
    "Exaone4ForCausalLM": _form(
        "exaone4.Exaone4ForCausalLM",
        "exaone4.Exaone4DecoderLayer",
        behind_norms(stream_alone),
        norm1="",
        norm2="",
        attention_out_norm="post_attention_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
    ),
    "OPTForCausalLM": _form(
        "opt.OPTForCausalLM",
        "opt.OPTDecoderLayer",
        unfused(opt),
        layers="model.decoder.layers",
        norm1="self_attn_layer_norm",
        norm2="final_layer_norm",
        o="self_attn.out_proj",
        down="fc2",
        switches=(("do_layer_norm_before", True),),
    ),
}
"""The allow-list: an architecture that vLLM has a class of its own for -> the form of its layers."""

BY_TRANSFORMERS = (
    "SmolLM3ForCausalLM",
    "SeedOssForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "CwmForCausalLM",
    "Starcoder2ForCausalLM",
    "ArceeForCausalLM",
)
"""The allow-list of architectures that vLLM runs by transformers' own layers."""

WITH_LANGUAGE_MODEL = {
    "Gemma3ForConditionalGeneration": "gemma3_mm.Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration": "gemma4_mm.Gemma4ForConditionalGeneration",
    "InternVLForConditionalGeneration": "interns1.InternS1ForConditionalGeneration",
    "LlavaForConditionalGeneration": "llava.LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "llava_next.LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision.LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration": "mistral3.Mistral3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "qwen3_5.Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5.Qwen3_5MoeForConditionalGeneration",
}
"""Models of text and images -> their class below vllm.model_executor.models, whose `language_model` is one of FORMS."""

SUPPORTED = (*FORMS, *BY_TRANSFORMERS, *WITH_LANGUAGE_MODEL)


def is_supported(runs: str, architecture: str) -> bool:
    """Say whether plans for `architecture` can be run by the class that vLLM names `runs`."""
    return architecture in (BY_TRANSFORMERS if runs == BACKEND else SUPPORTED) and runs in (BACKEND, architecture)
