"""The names under which a decoder layer keeps its parts. An architecture is a row of names, not a class.

A row is only a hint: `probe.py` checks on random input that a layer computes what its row says.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertNames:
    """Module paths, relative to the decoder layer, of the parts of a mixture of experts.

    `experts` holds all experts' weights, stacked. `shared` names, in any of the spellings, the MLP that every token
    goes through besides, and `shared_gate` the linear layer by whose sigmoid it is multiplied; a layer may lack them.
    `logits`, `weights` and `chosen` are the places, in what the router returns, of the logits of all experts, before
    softmax or sigmoid, and of the weights and the indices of those that it chooses.
    """

    router: str
    experts: str
    shared: tuple[str, ...] = ("mlp.shared_expert", "mlp.shared_experts")
    shared_gate: str = "mlp.shared_expert_gate"
    logits: int = 0
    weights: int = 1
    chosen: int = 2


@dataclass(frozen=True)
class LayerNames:
    """Module paths relative to the decoder layer, and transformers' classes that are known to have them.

    `qkv` names three linear layers, or a fused one that holds the rows of q, then k's, then v's. An attention of
    another kind lists its linear layers by how ranks divide them: those in `by_head` read the stream and are divided by
    head, those in `latents` read the stream and are whole on every rank, those in `behind_latents` read what these give
    and are divided by head. `head_parameters` names parameters with one number a query head, in a linear
    attention a head of v. `convolution` is that of a linear attention, whose channels are q, k and v; where `qkv` is
    fused there, q and k are divided by KV head and v by head.
    `heads` and `kv_heads` are the attention's attributes that count them, where they do not follow from the sizes of
    its linear layers; without `kv_heads` there are as many. `mlp_in` names one
    linear layer for act(first), two for act(gate) * up, or a fused one that holds the rows of the gate, then those of
    up. `norm1` and `norm2` are the norms in front of attention and MLP, "" where these read the residual stream itself.
    `attention_out_norm` and `mlp_out_norm` are those that a branch goes through before it is added to the stream, ""
    where there is none. `scale` names the layer's attribute, if any, by which both branches are multiplied, last, and
    `stream_scale` the number among its weights by which it multiplies the whole residual stream that it gives. A row
    of a mixture of experts names those in `experts`, and no linear layers of an MLP. Where `qkv` names two layers, what
    k's gives are the values, too.
    """

    classes: tuple[str, ...]
    norm1: str
    attention: str
    o: str
    norm2: str
    qkv: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()
    latents: tuple[str, ...] = ()
    behind_latents: tuple[str, ...] = ()
    head_parameters: tuple[str, ...] = ()
    convolution: str = ""
    heads: str = ""
    kv_heads: str = ""
    mlp_in: tuple[str, ...] = ()
    activation: str = ""
    down: str = ""
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    scale: str = ""
    stream_scale: str = ""
    experts: ExpertNames | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        """Return the names of all norms of the layer."""
        four = (self.norm1, self.attention_out_norm, self.norm2, self.mlp_out_norm)
        return tuple(name for name in four if name)


_NORMS: dict[str, Any] = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_SELF_ATTENTION: dict[str, Any] = {
    "attention": "self_attn",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": "self_attn.o_proj",
}
_GATED_MLP: dict[str, Any] = {
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "activation": "mlp.act_fn",
    "down": "mlp.down_proj",
}
_LATENT_ATTENTION: dict[str, Any] = {  # MLA; keys and values of all heads are made of one latent
    "attention": "self_attn",
    "latents": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "behind_latents": ("self_attn.q_b_proj", "self_attn.kv_b_proj"),
    "o": "self_attn.o_proj",
    "heads": "num_heads",
}
_LATENT_KEYS: dict[str, Any] = {  # the same with plain queries
    **_LATENT_ATTENTION,
    "by_head": ("self_attn.q_proj",),
    "latents": ("self_attn.kv_a_proj_with_mqa",),
    "behind_latents": ("self_attn.kv_b_proj",),
}
_EXPERTS = ExpertNames(router="mlp.gate", experts="mlp.experts")
_DELTA: dict[str, Any] = {  # Gated DeltaNet; there may be more heads of v than of q and k
    "attention": "linear_attn",
    "head_parameters": ("linear_attn.A_log", "linear_attn.dt_bias"),
    "convolution": "linear_attn.conv1d",
    "o": "linear_attn.out_proj",
}
_DELTA_NET: dict[str, Any] = {
    **_DELTA,
    "qkv": ("linear_attn.in_proj_qkv",),
    "by_head": ("linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "heads": "num_v_heads",
    "kv_heads": "num_k_heads",
}
_DELTA_NET_BY_KEY: dict[str, Any] = {  # everything lies together with the head of k that it belongs to
    **_DELTA,
    "by_head": ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    "heads": "num_k_heads",
}
_FUSED_MLP: dict[str, Any] = {
    "mlp_in": ("mlp.gate_up_proj",),
    "activation": "mlp.activation_fn",
    "down": "mlp.down_proj",
}

_SANDWICH: dict[str, Any] = {
    "norm1": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    **_GATED_MLP,
    "mlp_out_norm": "post_feedforward_layernorm",
}

LAYERS = {  # the first row that fits is taken: those that name more parts come before those that name fewer
    "Gemma 4": LayerNames(classes=("Gemma4ForCausalLM",), **_SELF_ATTENTION, **_SANDWICH, stream_scale="layer_scalar"),
    "Gemma 4, keys as values": LayerNames(
        classes=(),
        attention="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj"),
        o="self_attn.o_proj",
        **_SANDWICH,
        stream_scale="layer_scalar",
    ),
    "Gemma 2": LayerNames(classes=("Gemma2ForCausalLM", "Gemma3ForCausalLM"), **_SELF_ATTENTION, **_SANDWICH),
    "GLM-4-0414": LayerNames(
        classes=("Glm4ForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        attention_out_norm="post_self_attn_layernorm",
        **_FUSED_MLP,
        mlp_out_norm="post_mlp_layernorm",
    ),
    "Exaone 4": LayerNames(
        classes=("Exaone4ForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        norm1="",
        **_SELF_ATTENTION,
        attention_out_norm="post_attention_layernorm",
        norm2="",
        **_GATED_MLP,
        mlp_out_norm="post_feedforward_layernorm",
    ),
    "HyperCLOVA X": LayerNames(
        classes=("HyperCLOVAXForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        attention_out_norm="post_norm1",  # the identity unless its configuration says use_post_norm
        **_GATED_MLP,
        mlp_out_norm="post_norm2",
        scale="residual_multiplier",
    ),
    "Granite": LayerNames(
        classes=("GraniteForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        **_GATED_MLP,
        scale="residual_multiplier",
    ),
    "Llama": LayerNames(
        classes=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Ministral3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "SmolLM3ForCausalLM",
            "SeedOssForCausalLM",
            "Ernie4_5ForCausalLM",
            "HunYuanDenseV1ForCausalLM",
            "StableLmForCausalLM",
            "CwmForCausalLM",
        ),
        **_NORMS,
        **_SELF_ATTENTION,
        **_GATED_MLP,
    ),
    "Starcoder2": LayerNames(
        classes=("Starcoder2ForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        mlp_in=("mlp.c_fc",),
        activation="mlp.act",
        down="mlp.c_proj",
    ),
    "Apertus": LayerNames(
        classes=("ApertusForCausalLM",),
        norm1="attention_layernorm",
        **_SELF_ATTENTION,
        norm2="feedforward_layernorm",
        mlp_in=("mlp.up_proj",),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "Arcee": LayerNames(
        classes=("ArceeForCausalLM", "NemotronForCausalLM"),
        **_NORMS,
        **_SELF_ATTENTION,
        mlp_in=("mlp.up_proj",),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "Phi-3": LayerNames(
        classes=("Phi3ForCausalLM",),
        **_NORMS,
        attention="self_attn",
        qkv=("self_attn.qkv_proj",),
        o="self_attn.o_proj",
        **_FUSED_MLP,
    ),
    "GLM": LayerNames(
        classes=("GlmForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        **_FUSED_MLP,
    ),
    "Granite-MoE": LayerNames(
        classes=("GraniteMoeForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        scale="residual_multiplier",
        experts=ExpertNames(
            router="block_sparse_moe.router",
            experts="block_sparse_moe.experts",
            shared=(),
            logits=2,
            weights=1,
            chosen=0,
        ),
    ),
    "Mixtral": LayerNames(
        classes=(
            "MixtralForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "OlmoeForCausalLM",
            "Ernie4_5_MoeForCausalLM",
            "Glm4MoeForCausalLM",
        ),
        **_NORMS,
        **_SELF_ATTENTION,
        experts=_EXPERTS,
    ),
    "GPT-OSS": LayerNames(
        classes=("GptOssForCausalLM",),
        **_NORMS,
        **_SELF_ATTENTION,
        head_parameters=("self_attn.sinks",),
        experts=ExpertNames(router="mlp.router", experts="mlp.experts"),
    ),
    "DeepSeek": LayerNames(
        classes=("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"),
        **_NORMS,
        **_LATENT_ATTENTION,
        experts=_EXPERTS,
    ),
    "MiniCPM3": LayerNames(
        classes=("MiniCPM3ForCausalLM",),
        **_NORMS,
        **_LATENT_ATTENTION,
        **_GATED_MLP,
        scale="residual_scale",
    ),
    "DeepSeek, dense": LayerNames(classes=(), **_NORMS, **_LATENT_ATTENTION, **_GATED_MLP),
    "DeepSeek Lite": LayerNames(classes=(), **_NORMS, **_LATENT_KEYS, experts=_EXPERTS),
    "DeepSeek Lite, dense": LayerNames(classes=(), **_NORMS, **_LATENT_KEYS, **_GATED_MLP),
    "Gated DeltaNet": LayerNames(classes=("Qwen3_5ForCausalLM",), **_NORMS, **_DELTA_NET, **_GATED_MLP),
    "Gated DeltaNet, experts": LayerNames(classes=("Qwen3_5MoeForCausalLM",), **_NORMS, **_DELTA_NET, experts=_EXPERTS),
    "Gated DeltaNet by key": LayerNames(classes=(), **_NORMS, **_DELTA_NET_BY_KEY, **_GATED_MLP),
    "Gated DeltaNet by key, experts": LayerNames(
        classes=("Qwen3NextForCausalLM",), **_NORMS, **_DELTA_NET_BY_KEY, experts=_EXPERTS
    ),
    "OPT": LayerNames(
        classes=("OPTForCausalLM",),
        norm1="self_attn_layer_norm",
        attention="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o="self_attn.out_proj",
        norm2="final_layer_norm",
        mlp_in=("fc1",),
        activation="activation_fn",
        down="fc2",
    ),
}

SUPPORTED = ", ".join(name.removesuffix("ForCausalLM") for row in LAYERS.values() for name in row.classes)
