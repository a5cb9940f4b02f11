"""The list of vLLM's decoder layers that can drop their sync points: a row an architecture.

Names say nothing about what a layer computes (Gemma2 looks like Llama), so the list is of vLLM's own classes; where
vLLM runs transformers' own layers, it is of the architectures that were tested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from spd_calib.errors import InputError
from spd_calib.models.layer_names import LAYERS

from .forwards import Parts, deepseek, fused, gpt_oss, granite, opt, transformers_layer, unfused, with_unused_residual
from .mixtures import check_mixture, is_mixture, open_mixture
from .norm_forwards import behind_norms, sandwich, stream_alone
from .projections import open_projection

BACKEND = "TransformersForCausalLM"
"""vLLM's class for models whose layers are transformers' own."""


@dataclass(frozen=True)
class LayerForm:
    """The classes of an architecture's model and of its layers, with their modules, and the paths of a layer's parts.

    `planned(layer, parts, planned)` gives the forward that takes the place of the layer's own.
    """

    model: str
    layer: str
    planned: Callable[..., Callable]
    layers: str = "model.layers"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    o: str = "self_attn.o_proj"
    linear_o: str = ""  # the same of a layer with linear attention, where a model has such beside others
    down: str = "mlp.down_proj"
    mixture: str = ""  # the layer's module, if any, that may be a mixture of experts; else its MLP ends in `down`
    gate: str = "gate"  # its router
    scale: str = ""  # the layer's attribute, if any, by which it multiplies both branches
    stream_scale: str = ""  # the layer's buffer, if any, by which it multiplies the whole stream in the end
    switches: tuple[tuple[str, Any], ...] = ()  # attributes of the layer that must have these values
    configured: tuple[tuple[str, Any], ...] = ()  # and of the model's configuration, where vLLM reads no others
    routers: tuple[tuple[str, Any], ...] = ()  # and of the routers of its experts, which vLLM configures otherwise

    def parts(self, layer: nn.Module) -> Parts:
        """Return the parts of a layer of this form."""
        scale = float(getattr(layer, self.scale)) if self.scale else 1.0
        mixture = self.mixture_of(layer)
        o = open_projection(self.o_proj(layer), scale)
        down = (
            open_mixture(mixture, gate=self.gate, rank=o.rank, scale=scale)
            if mixture
            else open_projection(layer.get_submodule(self.down), scale)
        )
        norms = (self.norm1, self.norm2, self.attention_out_norm, self.mlp_out_norm)
        norm1, norm2, a, m = (layer.get_submodule(path) if path else nn.Identity() for path in norms)
        stream_scale = layer.get_buffer(self.stream_scale) if self.stream_scale else None
        return Parts(norm1, norm2, o, down, a, m, stream_scale)

    def o_proj(self, layer: nn.Module) -> Any:
        """Return the projection behind a layer's attention."""
        linear = self.linear_o and hasattr(layer, self.linear_o.partition(".")[0])
        return layer.get_submodule(self.linear_o if linear else self.o)

    def mixture_of(self, layer: nn.Module) -> nn.Module | None:
        """Return a layer's mixture of experts; None where it has a dense MLP."""
        module = layer.get_submodule(self.mixture) if self.mixture else None
        return module if is_mixture(module) else None

    def linears(self, layer: nn.Module) -> list[Any]:
        """Return the layer's row-parallel projections, behind each of which there is a sync point."""
        down = [] if self.mixture_of(layer) else [layer.get_submodule(self.down)]
        return [self.o_proj(layer), *down]

    def called(self, layer: nn.Module) -> list[nn.Module]:
        """Return the modules whose own forward a planned layer calls, or puts another in the place of."""
        mixture: Any = self.mixture_of(layer)
        of_mixture = [] if mixture is None else [mixture, mixture.get_submodule(self.gate), mixture.experts]
        return [layer, *self.linears(layer), *of_mixture]


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
    "LlavaForConditionalGeneration": "llava.LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration": "mistral3.Mistral3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "qwen3_5.Qwen3_5ForConditionalGeneration",
}
"""Models of text and images -> their class below vllm.model_executor.models, whose `language_model` is one of FORMS."""

SUPPORTED = (*FORMS, *BY_TRANSFORMERS, *WITH_LANGUAGE_MODEL)


def is_supported(runs: str, architecture: str) -> bool:
    """Say whether plans for `architecture` can be run by the class that vLLM names `runs`."""
    return architecture in (BY_TRANSFORMERS if runs == BACKEND else SUPPORTED) and runs in (BACKEND, architecture)


def find(model: nn.Module) -> tuple[LayerForm, list[Any]]:
    """Return the form of a loaded vLLM model's layers, and the layers.

    Raises InputError unless the very classes are those of the list.
    """
    model = language_model_of(model)
    form = _form_of(model)
    for name, read in form.configured:
        value = read(model.config) if callable(read) else read
        if (found := getattr(model.config, name, value)) != value:
            raise InputError(f"vLLM would leave out what its configuration asks for by {name} = {found}: no plan.")
    layers = list(model.get_submodule(form.layers).children())
    for layer in layers:
        if _place(layer) != form.layer:
            raise InputError(f"vLLM loaded a {_place(layer)} where a {form.layer} is expected.")
        if any(getattr(layer, name) != value for name, value in form.switches):
            raise InputError(
                f"This {type(layer).__name__} is not h = x + attn(norm1(x)), y = h + mlp(norm2(h)): no plan."
            )
        for linear in form.linears(layer):
            path = next(name for name, module in layer.named_modules() if module is linear)
            if type(linear).__name__ != "RowParallelLinear":
                raise InputError(f"The layer's {path} is no RowParallelLinear: its sync point is not known.")
            if not linear.input_is_parallel:
                raise InputError(f"vLLM gathers what the layer's {path} reads, so that no rank has a share of its own.")
        if (mixture := form.mixture_of(layer)) is not None:
            check_mixture(mixture, block=layers.index(layer), routers=form.routers)
    return form, layers


def language_model_of(model: Any) -> Any:
    """Return the language model in a loaded vLLM model of text and images; any other model itself."""
    inside = _place(model).removeprefix("vllm.model_executor.models.") in WITH_LANGUAGE_MODEL.values()
    return model.language_model if inside else model


def _form_of(model: Any) -> LayerForm:
    place = _place(model)
    if place.rpartition(".")[2] == BACKEND and place.startswith("vllm."):
        architecture = (model.config.architectures or [""])[0]
        if architecture in BY_TRANSFORMERS:
            return _form_by_transformers(place, architecture, model.config)
    for form in FORMS.values():
        if form.model == place:
            return form
    raise InputError(f"vLLM loaded {place}: its layers are not known.")


def _form_by_transformers(place: str, architecture: str, config: Any) -> LayerForm:
    """Return the form of transformers' layers of an architecture, whose parts have the names that its row says."""
    row = next(names for names in LAYERS.values() if architecture in names.classes)
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    layer = f"{module}.{architecture.removesuffix('ForCausalLM')}DecoderLayer"
    return LayerForm(
        place, layer, unfused(transformers_layer), norm1=row.norm1, norm2=row.norm2, o=row.o, down=row.down
    )


def _place(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
