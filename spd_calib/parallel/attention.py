"""Running an attention on some of its heads."""

from torch import Tensor, nn


def attended(attention: nn.Module, o: nn.Module, u: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """Return the attention's partial sum [B, T, d] where it reads u [B, T, d], and its head outputs [B, T, d_heads].

    `o` is its own slice of o_proj, which these enter; kwargs are as transformers hands them to the layer.
    """
    heads: list[Tensor] = []
    hook = o.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    try:
        partial = attention(hidden_states=u, **kwargs)[0]
    finally:
        hook.remove()
    return partial, heads[0]
