"""Testing whether a decoder layer computes what dropping a sync point presumes, by running it, not by its name.

Supported is `h = x + A(attn(n1(x)))`, `y = h + M(mlp(n2(h)))` with plain linear layers, n1 and n2 norms or nothing, A
and M nothing, a norm, a number to multiply by, or both (docs/design.md, section 2); the whole y may be multiplied, too.
Everything else is refused with one sentence that names the cause.
"""

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .all_heads_norm import all_heads_norms
from .architecture import Decoder, HeadCounts, find_decoder, layer_parts
from .experts import RankExperts, route
from .layer_names import SUPPORTED
from .linear_attention import as_attention
from .mlp import activations
from .parts import LayerParts
from .shard import RankSlices

NO_SOFTMAX_ATTENTION = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Kinds of blocks, as transformers' configurations spell them, whose mixer is not, or not only, softmax attention."""


def find_layers(model: PreTrainedModel) -> list[LayerParts]:
    """Return the parts of every decoder layer, by their form alone (works on the meta device, before weights are read).

    Raises InputError with the cause for an architecture that cannot be used.
    """
    decoder = find_decoder(model)
    _refuse_other_forms(model, decoder)
    parts = [layer_parts(layer) for layer in decoder.layers] if decoder else []
    if not parts or not all(parts):
        _refuse_unknown_names(model)
    found = [p for p in parts if p]
    for layer, p in zip(decoder.layers if decoder else (), found, strict=True):
        _refuse_other_norms(type(model).__name__, layer, p)
        _refuse_other_weights(type(model).__name__, p)
    return found


def _refuse_other_forms(model: PreTrainedModel, decoder: Decoder | None) -> None:
    """Raise InputError for a model whose modules or configuration show that its blocks have another form."""
    name = type(model).__name__
    if mixing := [n for n, m in model.named_modules() if "HyperConnection" in type(m).__name__]:
        raise InputError(
            f"{name} mixes several residual streams by weights that depend on its input ({mixing[0]}, "
            "hyper-connections): a rank's partial sum cannot wait in one of them, so its sync points cannot be dropped."
        )
    if getattr(model.config, "use_bidirectional_attention", False) not in (False, None, "vision"):  # of images alone
        raise InputError(f"{name} lets tokens see what follows them (use_bidirectional_attention): no language model.")
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        raise InputError(
            f"{name} caps its attention's scores (attn_logit_softcapping), which the implementation sdpa leaves out; "
            'load it with attn_implementation="eager".'
        )
    if getattr(model.config, "num_kv_shared_layers", 0):
        raise InputError(
            f"{name} has blocks that read keys and values of earlier ones (num_kv_shared_layers): not supported yet."
        )
    if _is_parallel(model):
        raise InputError(
            f"{name} runs attention and MLP in parallel: it has one sync per block already, there is nothing to drop."
        )
    projection = getattr(decoder.owner, "project_out", None) if decoder else None
    if projection is not None and getattr(model.config, "do_layer_norm_before", True):
        raise InputError(
            f"{name} has a projection between its blocks and its output head (word_embed_proj_dim "
            f"{model.config.word_embed_proj_dim}, hidden_size {model.config.hidden_size}): not supported."
        )


def _refuse_unknown_names(model: PreTrainedModel) -> NoReturn:
    """Raise InputError for a model whose layers' parts have names that no row knows, with the likely cause."""
    name = type(model).__name__
    kinds = {str(kind) for kind in getattr(model.config, "layer_types", None) or ()}
    if other := sorted(kinds & NO_SOFTMAX_ATTENTION):
        form = "is a hybrid" if kinds - NO_SOFTMAX_ATTENTION else "has no plain attention"
        raise InputError(
            f"{name} {form} (its blocks are of the kind {', '.join(other)}): how such mixers are divided over ranks is "
            "not supported yet."
        )
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if mixed := [n for n, m in model.named_modules() if n.endswith((".experts", ".router", "block_sparse_moe"))]:
        raise InputError(
            f"{name} is a mixture of experts ({mixed[0]}) whose router, experts or attention lie otherwise than this "
            "tool knows, which is not supported yet."
        )
    fused = [
        n for n in sorted(linears) if n.endswith(("qkv_proj", "query_key_value", "c_attn", "gate_up_proj", "Wqkv"))
    ]
    if fused:
        raise InputError(
            f"{name} has fused projections ({fused[0]}) that lie otherwise than this tool knows (q, then k, then v; "
            "the gate, then up), which is not supported yet."
        )
    raise InputError(f"{name} is not supported; supported are {SUPPORTED} and models built alike.")


def _refuse_other_norms(name: str, layer: nn.Module, parts: LayerParts) -> None:
    """Raise InputError where the layer has norms beside those that its row of names knows."""
    norms = [n for n, m in layer.named_children() if "norm" in n and not isinstance(m, nn.Identity)]
    if other := [n for n in norms if n not in parts.names.norms]:
        raise InputError(
            f"{name} has other norms in its blocks than the supported forms ({', '.join(other)}, beside "
            f"{', '.join(parts.names.norms)}): what they do to a branch is not known."
        )


def _refuse_other_weights(name: str, parts: LayerParts) -> None:
    """Raise InputError where the attention has weights beside its linear layers that not all heads share.

    Cut over ranks are the linear layers, norms over all heads and parameters that its row names. What all heads share
    are norms of one head's size, or of a latent's.
    """
    own = {id(p) for linear in parts.linears for p in linear.parameters()}
    one_head = getattr(parts.attention, "head_dim" if parts.convolution is None else "head_v_dim", None)
    shapes = {(linear.in_features,) for linear in parts.by_head} if parts.latents else {(one_head,)}
    known = {f"{norm}.weight" for norm in all_heads_norms(parts)} | set(parts.head_parameters)
    if parts.convolution is not None and parts.convolution.groups == parts.convolution.out_channels:
        own.add(id(parts.convolution.weight))
    for path, parameter in parts.attention.named_parameters():
        if id(parameter) not in own and path not in known and (parameter.shape not in shapes or path.count(".") != 1):
            raise InputError(
                f"{name} has weights in its attention beside q, k, v, o and norms that all heads share ({path}): how "
                "they are divided over ranks is not supported yet."
            )


def _is_parallel(model: PreTrainedModel) -> bool:
    """Tell whether attention and MLP run in parallel: the configuration says so, or a layer has one norm for both."""
    config = model.config
    if getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False):
        return True
    for module in model.modules():
        children = {n for n, _ in module.named_children()}
        attention = children & {"self_attn", "attn", "attention", "self_attention"}
        if attention and "mlp" in children:
            return len([n for n in children if "norm" in n or n.startswith("ln")]) < 2
    return False


def check_block(index: int, layer: nn.Module, parts: LayerParts, hidden: Tensor, kwargs: dict) -> None:
    """Compare a layer with the supported form on random input of `hidden`'s shape [B, T, d], scale and dtype.

    `kwargs` are what the model hands its layers (mask, positions). Raises InputError naming what differs.
    """
    generator = torch.Generator().manual_seed(index)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden)
    x = noise * hidden.float().pow(2).mean().sqrt().clamp(min=1e-3).to(hidden)
    seen: dict[str, Tensor] = {}
    hooks = [
        parts.attention.register_forward_pre_hook(
            lambda m, args, kw: seen.update(attention=args[0] if args else kw["hidden_states"]), with_kwargs=True
        ),
        parts.norm2.register_forward_pre_hook(lambda m, args: seen.update(norm2=args[0])),
    ]
    try:
        computed = layer(x, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    computed = computed[0] if isinstance(computed, tuple) else computed
    attend = parts.attention if parts.convolution is None else partial(as_attention, parts.attention)
    a = attend(hidden_states=parts.norm1(x), **kwargs)[0]
    h = x + parts.scale * _through(parts.attention_out_norm, a)
    y = h + parts.scale * _through(parts.mlp_out_norm, mlp(parts, parts.norm2(h)))
    if _close(computed, y if parts.stream_scale is None else parts.stream_scale() * y, x):
        return
    if not computed.isfinite().all():
        cause = "on random input it gives NaN or Inf"
    elif "attention" in seen and parts.names.norm1 and _close(seen["attention"], x, torch.zeros_like(x)):
        cause = "it is a post-norm model, attention reads the residual stream itself"
    elif "norm2" in seen and not _close(seen["norm2"].reshape(h.shape), h, x) and _parallel(seen["norm2"], h - x, x):
        ratio = parts.scale * _ratio(seen["norm2"].reshape(h.shape) - x, h - x)
        cause = f"its attention's branch is scaled (by {ratio:.3g}, not {parts.scale:.3g})"
    else:
        cause = "it computes something else, such as a post-norm or scaled residual"
    raise InputError(
        f"Block {index} ({type(layer).__name__}) is not {equation(parts)}: {cause}; its sync point cannot be dropped."
    )


def equation(parts: LayerParts) -> str:
    """Return what the layer should compute, as messages say it."""
    s = "" if parts.scale == 1.0 else f"{parts.scale:.3g} "
    attention = "attn(norm1(x))" if parts.names.norm1 else "attn(x)"
    mlp = "mlp(norm2(h))" if parts.names.norm2 else "mlp(h)"
    attention = f"norm({attention})" if parts.attention_out_norm is not None else attention
    mlp = f"norm({mlp})" if parts.mlp_out_norm is not None else mlp
    y = f"h + {s}{mlp}"
    return f"h = x + {s}{attention}, y = {y if parts.stream_scale is None else f'number ({y})'}"


def _through(norm: nn.Module | None, out: Tensor) -> Tensor:
    return out if norm is None else norm(out)


def mlp(parts: LayerParts, u: Tensor) -> Tensor:
    """Return what the whole MLP, or mixture of experts, gives for u, bias included: [B, T, d] to [B, T, d]."""
    if parts.experts is not None:
        routing = route(parts.experts, u)
        out = RankExperts(parts.experts, RankSlices.of(HeadCounts.of(parts), 0, 1), scale=1.0)(u, routing)
        bias = routing.bias(parts.experts, u)
        return out if bias is None else out + bias
    return parts.down(activations(parts.mlp_in, parts.activation, u, neurons=parts.down.in_features))


def _close(a: Tensor, b: Tensor, x: Tensor) -> bool:
    """Tell whether a and b are equal up to rounding, relative to what the layer adds to x."""
    scale = (b - x).float().norm().clamp(min=1e-6)
    tolerance = 1e-3 if a.dtype == torch.float32 else 0.1
    return bool((a.float() - b.float()).norm() <= tolerance * scale)


def _parallel(h: Tensor, branch: Tensor, x: Tensor) -> bool:
    """Tell whether h - x is a multiple of `branch`, the attention's output."""
    added = (h.reshape(x.shape) - x).float().flatten()
    return bool(torch.cosine_similarity(added, branch.float().flatten(), dim=0) > 0.999)


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.float().norm() / b.float().norm())
