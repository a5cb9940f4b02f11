"""Finding the parts of a decoder layer by the names of a row (layer_names.py), and the counts that ranks divide."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .layer_names import LAYERS, ExpertNames, LayerNames
from .parts import ExpertParts, LayerParts, LinearRows, MLPParts


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """Return the parts of `layer` by the first row of LAYERS whose every name it has; None where no row fits."""
    for names in LAYERS.values():
        single = ("attention", "o")
        found: dict[str, Any] = {field: _find(layer, getattr(names, field)) for field in single}
        found |= {field: _norm(layer, getattr(names, field)) for field in ("norm1", "norm2")}
        behind = {field: _norm(layer, getattr(names, field)) for field in ("attention_out_norm", "mlp_out_norm")}
        of_attention = (names.qkv, names.by_head + names.behind_latents, names.latents)
        qkv, by_head, latents = (_find_all(layer, listed) for listed in of_attention)
        scale: Any = getattr(layer, names.scale, None) if names.scale else 1.0
        stream_scale = partial(layer.get_buffer, names.stream_scale) if names.stream_scale else None
        if names.stream_scale not in ("", *dict(layer.named_buffers())):
            continue
        ffn: Any = _experts(layer, names.experts) if names.experts else _mlp(layer, names)
        linears = (*qkv, *by_head, *latents, found["o"])
        parameters = [_parameter(layer, name) for name in names.head_parameters]
        if None not in (*found.values(), *behind.values(), *parameters, scale, ffn) and all(
            isinstance(m, nn.Linear) for m in linears
        ):
            of_o = found["o"].in_features
            convolution = _find(layer, names.convolution) if names.convolution else None
            if len(qkv) == 1:
                qkv = _unfused(qkv[0], q_rows=of_o) if convolution is None else _of_linear(qkv[0], v_rows=of_o)
            found |= {"by_head": (*qkv[:1], *by_head), "by_kv_head": qkv[1:], "latents": latents}
            found |= {"convolution": convolution}
            norms: dict[str, Any] = {f: None if isinstance(norm, nn.Identity) else norm for f, norm in behind.items()}
            return LayerParts(names, **found, **norms, ffn=ffn, scale=float(scale), stream_scale=stream_scale)
    return None


def _norm(layer: nn.Module, name: str) -> nn.Module | None:
    """Return the norm of that name, the identity where a row has no name for it, None where the layer lacks it."""
    return _find(layer, name) if name else nn.Identity()


def _mlp(layer: nn.Module, names: LayerNames) -> MLPParts | None:
    """Return the parts of the layer's MLP by their names; None where one of them is not there, or no linear layer."""
    mlp_in: tuple[Any, ...] = tuple(_find(layer, name) for name in names.mlp_in)
    activation, down = _find(layer, names.activation), _find(layer, names.down)
    if activation is None or not isinstance(down, nn.Linear) or not all(isinstance(m, nn.Linear) for m in mlp_in):
        return None
    return MLPParts(mlp_in, activation, down)


def _experts(layer: nn.Module, names: ExpertNames) -> ExpertParts | None:
    """Return the parts of the layer's mixture of experts by their names; None where one of them is not there."""
    router, experts = _find(layer, names.router), _find(layer, names.experts)
    if router is None or experts is None or not isinstance(getattr(experts, "down_proj", None), nn.Parameter):
        return None
    shared = [_shared(m) for name in names.shared if (m := _find(layer, name)) is not None]
    gate = _find(layer, names.shared_gate)
    if None in shared or not (gate is None or isinstance(gate, nn.Linear)):
        return None
    parts = ExpertParts(router, experts, shared[0] if shared else None, gate, names)
    if (parts.transposed or parts.has_bias) and not parts.interleaved:
        return None  # a rank's share of gate and up would lie in two ranges of columns
    return parts


def _shared(mlp: nn.Module) -> MLPParts | None:
    """Return the parts of a shared expert: an MLP with the names that Llama's has."""
    gate, up, activation, down = (_find(mlp, name) for name in ("gate_proj", "up_proj", "act_fn", "down_proj"))
    if activation is None or not all(isinstance(m, nn.Linear) for m in (gate, up, down)):
        return None
    return MLPParts((gate, up), activation, down)  # type: ignore[arg-type]


def _unfused(qkv: nn.Linear, *, q_rows: int) -> tuple[LinearRows, ...]:
    """Return q, k and v of a linear layer that holds the rows of q, then those of k, then as many of v."""
    kv_rows = (qkv.out_features - q_rows) // 2
    return (LinearRows(qkv, 0, q_rows), *(LinearRows(qkv, q_rows + i * kv_rows, kv_rows) for i in range(2)))


def _of_linear(qkv: nn.Linear, *, v_rows: int) -> tuple[LinearRows, ...]:
    """Return v, q and k of a linear attention's fused layer, which holds the rows of q, then as many of k, then v's."""
    k_rows = (qkv.out_features - v_rows) // 2
    return (LinearRows(qkv, 2 * k_rows, v_rows), *(LinearRows(qkv, i * k_rows, k_rows) for i in range(2)))


def _find_all(layer: nn.Module, paths: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(_find(layer, path) for path in paths)


def _parameter(layer: nn.Module, path: str) -> str | None:
    """Return the name of a parameter of the layer; None where it has none of that name."""
    return path if path in dict(layer.named_parameters()) else None


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
    """Heads and neurons of one block, before they are divided over ranks.

    `head_dim` is the width of what a head gives. In a mixture of experts `neurons` are those of each expert,
    `shared_neurons` those of the shared ones.
    """

    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    shared_neurons: int = 0

    @classmethod
    def of(cls, parts: LayerParts) -> "HeadCounts":
        attention: Any = parts.attention
        shared = parts.experts.shared if parts.experts else None
        if parts.names.heads:
            heads = getattr(attention, parts.names.heads)
            kv_heads = getattr(attention, parts.names.kv_heads or parts.names.heads)
        else:
            heads, kv_heads = (n // attention.head_dim for n in (parts.o.in_features, parts.by_kv_head[0].out_features))
        return cls(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=parts.o.in_features // heads,
            neurons=parts.experts.neurons if parts.experts else parts.down.in_features,
            shared_neurons=shared.down.in_features if shared else 0,
        )


def check_divides(counts: HeadCounts, tp: int) -> None:
    """Raise InputError, naming what does not divide and what would, unless `tp` ranks can share the block."""
    if not counts.neurons:
        raise InputError("The configuration's MLPs have 0 neurons, which no model has; fetch the model again.")
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
    if counts.shared_neurons % tp:
        return f"{counts.shared_neurons} neurons of the shared experts"
    return ""
