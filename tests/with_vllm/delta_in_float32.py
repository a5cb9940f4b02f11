"""Gated DeltaNet's recurrence in float32, a token at a time, for vLLM's CPU build, whose kernel knows bfloat16 alone.

Everything around it, the projections, caches and batches, is vLLM's own.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

from spd_calib.runtimes.vllm import configure

OF_VLLM = gdn_attention.cpu_gdn_attention_core


def install() -> None:
    """Have vLLM register this recurrence beside its own kernel, before the first model is loaded in this process."""
    gdn_attention.cpu_gdn_attention_core = _core
    configure.check_attention = lambda config: None  # it would say that there is none


def _core(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
    if mixed_qkv.dtype != torch.float32:
        return OF_VLLM(mixed_qkv, b, a, core_attn_out, layer_name)
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return None
    batch = context.attn_metadata[layer.prefix]
    starts, slots = batch.non_spec_query_start_loc.tolist(), batch.non_spec_state_indices_tensor.tolist()
    weights = layer.conv1d.weight[:, 0]  # [channels, width]
    keeps = (-layer.A_log.exp() * softplus(a + layer.dt_bias)).exp()
    writes = torch.sigmoid(b)
    for i in range(batch.num_decodes + batch.num_prefills):
        before, state = (cache[slots[i]] for cache in layer.kv_cache)  # [width - 1, channels], [heads, v, k]
        if i >= batch.num_decodes and not batch.has_initial_state[i]:
            before.zero_()
            state.zero_()
        for t in range(starts[i], starts[i + 1]):
            window = torch.cat([before, mixed_qkv[t : t + 1]])
            before.copy_(window[1:])
            mixed = silu((window.T * weights).sum(-1))
            q, k, v = (heads[0, 0] for heads in layer.rearrange_mixed_qkv(mixed[None]))
            q, k = (_unit(x).repeat_interleave(len(v) // len(x), dim=0) for x in (q, k))
            state.mul_(keeps[t, :, None, None])
            missed = v - torch.einsum("hvk,hk->hv", state, k)
            state.add_(writes[t, :, None, None] * missed[:, :, None] * k[:, None])
            core_attn_out[t] = torch.einsum("hvk,hk->hv", state, q) / k.shape[-1] ** 0.5
    return None


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
