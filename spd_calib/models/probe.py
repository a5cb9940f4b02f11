"""Testing whether a decoder layer computes what dropping a sync point presumes, by running it, not by its name.

Supported is `h = x + attn(n1(x))`, `y = h + mlp(n2(h))` with plain linear layers (docs/design.md, section 2).
Everything else is refused with one sentence that names the cause.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .architecture import SUPPORTED, LayerParts, find_decoder, layer_parts
from .mlp import activations


def find_layers(model: PreTrainedModel) -> list[LayerParts]:
    """Return the parts of every decoder layer, by their form alone (works on the meta device, before weights are read).

    Raises InputError with the cause for an architecture that cannot be used.
    """
    name = type(model).__name__
    decoder = find_decoder(model)
    parts = [layer_parts(layer) for layer in decoder.layers] if decoder else []
    experts = [n for n, m in model.named_modules() if n.endswith((".experts", ".router", "block_sparse_moe"))]
    if experts:
        raise InputError(
            f"{name} is a mixture of experts ({experts[0]}): a router on a rank's partial input would disagree "
            "with the other ranks', so its sync points cannot be dropped."
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
    if parts and all(parts):
        norms = [n for n, m in decoder.layers[0].named_children() if "norm" in n]  # type: ignore[union-attr]
        if len(norms) > 2:
            raise InputError(
                f"{name} is a post-norm model (its blocks hold {', '.join(norms)}): what a rank's partial sum becomes "
                "is only known after the sync, so it cannot be dropped."
            )
        return [p for p in parts if p]
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    fused = [
        n for n in sorted(linears) if n.endswith(("qkv_proj", "query_key_value", "c_attn", "gate_up_proj", "Wqkv"))
    ]
    if fused:
        raise InputError(f"{name} has fused projections ({fused[0]}): fused q/k/v or gate/up are not supported yet.")
    layer = decoder.layers[0] if decoder else None
    if layer is not None and any(n.startswith("post_") for n, _ in layer.named_children()):
        raise InputError(
            f"{name} is a post-norm model: its block's residual form is not h = x + attn(norm(x)), "
            "so a sync point cannot be dropped."
        )
    raise InputError(f"{name} is not supported; supported are {SUPPORTED} and models built alike.")


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
    h = x + parts.attention(hidden_states=parts.norm1(x), **kwargs)[0]
    if _close(computed, h + mlp(parts, parts.norm2(h)), x):
        return
    if not computed.isfinite().all():
        cause = "on random input it gives NaN or Inf"
    elif "attention" in seen and _close(seen["attention"], x, torch.zeros_like(x)):
        cause = "it is a post-norm model, attention reads the residual stream itself"
    elif "norm2" in seen and not _close(seen["norm2"].reshape(h.shape), h, x) and _parallel(seen["norm2"], h - x, x):
        cause = f"its residual branches are scaled (by {_ratio(seen['norm2'].reshape(h.shape) - x, h - x):.3g})"
    else:
        cause = "it computes something else, such as a post-norm or scaled residual"
    raise InputError(
        f"Block {index} ({type(layer).__name__}) is not h = x + attn(norm1(x)), y = h + mlp(norm2(h)): {cause}; "
        "its sync point cannot be dropped."
    )


def mlp(parts: LayerParts, u: Tensor) -> Tensor:
    """Return what the dense MLP, bias included, gives for u: [B, T, d] to [B, T, d]."""
    return parts.down(activations(parts.mlp_in, parts.activation, u))


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
