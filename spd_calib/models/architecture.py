"""The names under which a decoder layer keeps its parts. An architecture is a row of names, not a class.

A row is only a hint: `probe.py` checks on random input that a layer computes what its row says.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError


@dataclass(frozen=True)
class LayerNames:
    """Module paths relative to the decoder layer, and transformers' classes that are known to have them.

    `qkv` names three linear layers, or a fused one that holds the rows of q, then k's, then v's. `mlp_in` names one
    linear layer for act(first), two for act(gate) * up, or a fused one that holds the rows of the gate, then those of
    up. `scale` names the layer's attribute, if any, by which both branches are multiplied before they are added to the
    residual stream.
    """

    classes: tuple[str, ...]
    norm1: str
    attention: str
    qkv: tuple[str, ...]
    o: str
    norm2: str
    mlp_in: tuple[str, ...]
    activation: str
    down: str
    scale: str = ""


_SELF_ATTENTION: dict[str, Any] = {
    "attention": "self_attn",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}

LAYERS = {
    "Granite": LayerNames(
        classes=("GraniteForCausalLM", "HyperCLOVAXForCausalLM"),
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        down="mlp.down_proj",
        scale="residual_multiplier",  # before Llama, whose names it has as well
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
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "Starcoder2": LayerNames(
        classes=("Starcoder2ForCausalLM",),
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.c_fc",),
        activation="mlp.act",
        down="mlp.c_proj",
    ),
    "Apertus": LayerNames(
        classes=("ApertusForCausalLM",),
        norm1="attention_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="feedforward_layernorm",
        mlp_in=("mlp.up_proj",),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "Arcee": LayerNames(
        classes=("ArceeForCausalLM", "NemotronForCausalLM"),
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.up_proj",),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "Phi-3": LayerNames(
        classes=("Phi3ForCausalLM",),
        norm1="input_layernorm",
        attention="self_attn",
        qkv=("self_attn.qkv_proj",),
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.gate_up_proj",),
        activation="mlp.activation_fn",
        down="mlp.down_proj",
    ),
    "GLM": LayerNames(
        classes=("GlmForCausalLM",),
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.gate_up_proj",),
        activation="mlp.activation_fn",
        down="mlp.down_proj",
    ),
    "OPT": LayerNames(
        classes=("OPTForCausalLM",),
        norm1="self_attn_layer_norm",
        **_SELF_ATTENTION,
        o="self_attn.out_proj",
        norm2="final_layer_norm",
        mlp_in=("fc1",),
        activation="activation_fn",
        down="fc2",
    ),
}

SUPPORTED = ", ".join(name.removesuffix("ForCausalLM") for row in LAYERS.values() for name in row.classes)


@dataclass(frozen=True)
class LinearRows:
    """One of the projections that a fused linear layer holds: `out_features` of its output rows, from `start` on."""

    linear: nn.Linear
    start: int
    out_features: int

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def weight(self) -> Tensor:
        """Return its rows of the weight, which they share memory with."""
        return self.linear.weight[self.start : self.start + self.out_features]

    @property
    def bias(self) -> Tensor | None:
        bias = self.linear.bias
        return None if bias is None else bias[self.start : self.start + self.out_features]


@dataclass(frozen=True)
class LayerParts:
    """The parts of one decoder layer, found. `mlp_in` holds the gate first where there is one (LayerNames)."""

    norm1: nn.Module
    attention: nn.Module
    q: nn.Linear | LinearRows
    k: nn.Linear | LinearRows
    v: nn.Linear | LinearRows
    o: nn.Linear
    norm2: nn.Module
    mlp_in: tuple[nn.Linear, ...]
    activation: nn.Module
    down: nn.Linear
    scale: float = 1.0  # what both branches are multiplied by, biases and all

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Return the linear layers as the model holds them, a fused one once."""
        qkv = dict.fromkeys(p.linear if isinstance(p, LinearRows) else p for p in (self.q, self.k, self.v))
        return (*qkv, self.o, *self.mlp_in, self.down)


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """Return the parts of `layer` by the first row of LAYERS whose every name it has; None where no row fits."""
    for names in LAYERS.values():
        single = ("norm1", "attention", "o", "norm2", "activation", "down")
        found: dict[str, Any] = {field: _find(layer, getattr(names, field)) for field in single}
        qkv: tuple[Any, ...] = tuple(_find(layer, name) for name in names.qkv)
        mlp_in: tuple[Any, ...] = tuple(_find(layer, name) for name in names.mlp_in)
        scale: Any = getattr(layer, names.scale, None) if names.scale else 1.0
        linears = (*qkv, *mlp_in, found["o"], found["down"])
        if None not in (*found.values(), scale) and all(isinstance(m, nn.Linear) for m in linears):
            q, k, v = qkv if len(qkv) == 3 else _unfused(qkv[0], q_rows=found["o"].in_features)
            return LayerParts(**found, q=q, k=k, v=v, mlp_in=mlp_in, scale=float(scale))
    return None


def _unfused(qkv: nn.Linear, *, q_rows: int) -> list[LinearRows]:
    """Return q, k and v of a linear layer that holds the rows of q, then those of k, then as many of v."""
    kv_rows = (qkv.out_features - q_rows) // 2
    return [LinearRows(qkv, 0, q_rows), *(LinearRows(qkv, q_rows + i * kv_rows, kv_rows) for i in range(2))]


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


@dataclass(frozen=True)
class Decoder:
    """The module that owns the layer list, its path in the model, and the final norm's attribute."""

    owner: nn.Module
    path: str
    norm: str

    @property
    def layers(self) -> nn.ModuleList:
        return self.owner.layers  # type: ignore[return-value]


def find_decoder(model: PreTrainedModel) -> Decoder | None:
    """Return the decoder of a causal LM, the module with a `layers` list and a final norm; None where there is none."""
    for path, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == model.config.num_hidden_layers:
            for norm in ("norm", "final_layer_norm"):
                if hasattr(module, norm):  # None in some old OPTs
                    return Decoder(module, f"{path}.layers", norm)
    return None


@dataclass(frozen=True)
class HeadCounts:
    """Heads and neurons of one block, before they are divided over ranks."""

    heads: int
    kv_heads: int
    head_dim: int
    neurons: int

    @classmethod
    def of(cls, parts: LayerParts) -> "HeadCounts":
        head_dim = int(parts.attention.head_dim)  # type: ignore[arg-type]
        return cls(
            heads=parts.q.out_features // head_dim,
            kv_heads=parts.k.out_features // head_dim,
            head_dim=head_dim,
            neurons=parts.down.in_features,
        )


def check_divides(counts: HeadCounts, tp: int) -> None:
    """Raise InputError, naming what does not divide and what would, unless `tp` ranks can share the block."""
    usable = [n for n in range(1, counts.heads + 1) if not _indivisible(counts, n)]
    if tp < 1 or (what := _indivisible(counts, tp)):
        what = what if tp >= 1 else f"{tp} is no number of ranks"
        raise InputError(f"TP {tp} does not divide this model: {what}; usable are {', '.join(map(str, usable))}.")


def _indivisible(counts: HeadCounts, tp: int) -> str:
    if counts.heads % tp:
        return f"{counts.heads} query heads"
    if counts.kv_heads % tp and tp % counts.kv_heads:
        return f"{counts.kv_heads} KV heads"
    if counts.neurons % tp:
        return f"{counts.neurons} MLP neurons"
    return ""
