"""The names under which a decoder layer keeps its parts. An architecture is a row of names, not a class.

A row is only a hint: `probe.py` checks on random input that a layer computes what its row says.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError


@dataclass(frozen=True)
class LayerNames:
    """Module paths relative to the decoder layer. Two `mlp_in` modules mean act(first) * second."""

    norm1: str
    attention: str
    q: str
    k: str
    v: str
    o: str
    norm2: str
    mlp_in: tuple[str, ...]
    activation: str
    down: str


_SELF_ATTENTION = {
    "attention": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
}

LAYERS = {
    "Llama, Mistral, Qwen2, Qwen3, Gemma": LayerNames(
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "Starcoder2": LayerNames(
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.c_fc",),
        activation="mlp.act",
        down="mlp.c_proj",
    ),
    "Arcee": LayerNames(
        norm1="input_layernorm",
        **_SELF_ATTENTION,
        o="self_attn.o_proj",
        norm2="post_attention_layernorm",
        mlp_in=("mlp.up_proj",),
        activation="mlp.act_fn",
        down="mlp.down_proj",
    ),
    "OPT": LayerNames(
        norm1="self_attn_layer_norm",
        **_SELF_ATTENTION,
        o="self_attn.out_proj",
        norm2="final_layer_norm",
        mlp_in=("fc1",),
        activation="activation_fn",
        down="fc2",
    ),
}

SUPPORTED = ", ".join(LAYERS)


@dataclass(frozen=True)
class LayerParts:
    """The parts of one decoder layer, found. `mlp_in` holds the gate first where there is one."""

    norm1: nn.Module
    attention: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    norm2: nn.Module
    mlp_in: tuple[nn.Linear, ...]
    activation: nn.Module
    down: nn.Linear

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return (self.q, self.k, self.v, self.o, *self.mlp_in, self.down)


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """Return the parts of `layer` by the first row of LAYERS whose every name it has; None where no row fits."""
    for names in LAYERS.values():
        found = {field: _find(layer, name) for field, name in vars(names).items() if isinstance(name, str)}
        mlp_in = tuple(_find(layer, name) for name in names.mlp_in)
        linears = (*(found[part] for part in ("q", "k", "v", "o", "down")), *mlp_in)
        if None not in (*found.values(), *mlp_in) and all(isinstance(m, nn.Linear) for m in linears):
            return LayerParts(**found, mlp_in=mlp_in)  # type: ignore[arg-type]
    return None


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
