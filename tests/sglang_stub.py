"""SGLang's decoder layers as a planned forward sees them, for a machine without SGLang; real ranks, real sums.

The names, signatures and the order of calls are those of SGLang 0.5.23 (test_sglang.py holds them against its source
where it lies); what is computed is written anew. Like SGLang's on a GPU, a norm that is given a residual writes into
both of its tensors.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LINEAR, BOUNDARY = "sglang.srt.layers.linear", "sglang.srt.layers.layer_boundary.stage"


class UnquantizedLinearMethod:
    __module__ = "sglang.srt.layers.quantization.unquant"

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class RowParallelLinear(nn.Module):
    """One rank's columns of a projection: its partial sum, the bias on rank 0."""

    __module__ = LINEAR
    input_is_parallel, skip_bias_add, use_decode_attn_tp = True, False, False

    def __init__(self, linear: nn.Linear, *, reduce_results: bool):
        super().__init__()
        self.reduce_results, self.rank = reduce_results, dist.get_rank()
        self.weight = nn.Parameter(linear.weight.chunk(dist.get_world_size(), 1)[self.rank].clone())
        self.bias = linear.bias
        self.output_size, self.input_size_per_partition = self.weight.shape
        self.params_dtype, self.quant_method = self.weight.dtype, UnquantizedLinearMethod()

    def forward(self, input_, skip_all_reduce=False, forward_batch=None, output_tensor=None):
        return self.quant_method.apply(self, input_, bias=self.bias if self.rank == 0 else None), None


class RMSNorm(nn.Module):
    __module__ = "sglang.srt.layers.layernorm"

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x, residual=None, post_residual_addition=None, quant_linear=None):
        total = x if residual is None else residual.add_(x)
        normed = self.weight * total * (total.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return normed if residual is None else (x.copy_(normed), residual)


class ResidualStream:
    """Holds what is added up, and what the next norm has yet to add to it."""

    def __init__(self, residual=None):
        self.residual, self.pending = residual, None

    def write(self, residual):
        self.residual, self.pending = residual, None
        return residual

    def record(self, output, update=None, *, declared_sum=None):
        assert self.pending is None, "cannot replace an unconsumed producer contribution"
        self.pending = output
        return OwedOutput(self)


class OwedOutput:
    """Says that the sum over the ranks is still to be taken; nobody may look into it."""

    def __init__(self, stream: ResidualStream):
        self.stream = stream


class StageBoundary:
    """In front of a sub-layer: sums over the ranks what is pending, adds it and norms. Behind one: keeps its output."""

    __module__ = BOUNDARY
    declaration = SimpleNamespace(row_transport=None)

    def __init__(self, norm: RMSNorm):
        self.norm = norm

    def prepare(self, hidden_states, forward_batch, *, cache=None, **call):
        stream = forward_batch.residual_stream
        if stream.pending is None:
            assert stream.residual is None or stream.residual is hidden_states
            stream.write(hidden_states)
            return self.norm(hidden_states)
        u, residual = self.norm(summed(hidden_states, stream), stream.residual)
        stream.write(residual)
        return u

    def finish(self, hidden_states, forward_batch, *, update_context=None):
        return forward_batch.residual_stream.record(hidden_states)


def summed(handle: OwedOutput, stream: ResidualStream) -> Tensor:
    """What is pending in the stream that the handle is of, summed over the ranks."""
    assert handle.stream is stream
    dist.all_reduce(stream.pending)
    counted.append(1)
    return stream.pending


counted: list[int] = []
"""One entry for each sum over the ranks that this process has taken part in."""


class Attention(nn.Module):
    """One rank's heads of transformers' attention; its cache is the batch itself."""

    def __init__(self, attention: nn.Module, rotary: nn.Module):
        super().__init__()
        self.inner, self.rotary, (self.rank, self.ranks) = [attention], rotary, (dist.get_rank(), dist.get_world_size())
        self.o_proj = RowParallelLinear(attention.o_proj, reduce_results=False)

    def forward(self, positions, hidden_states, forward_batch):
        (own,) = self.inner
        shape = (*hidden_states.shape[:-1], -1, own.head_dim)
        q, k, v = (linear(hidden_states).view(shape) for linear in (own.q_proj, own.k_proj, own.v_proj))
        if hasattr(own, "q_norm"):
            q, k = own.q_norm(q), own.k_norm(k)
        q, k, v = (t.transpose(0, 1)[None].chunk(self.ranks, 1)[self.rank] for t in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(v, positions[None]))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output, _ = self.o_proj(found[0].transpose(0, 1).flatten(1))
        return output


class MLP(nn.Module):
    """One rank's neurons of transformers' MLP."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.inner, self.rank, self.ranks = [mlp], dist.get_rank(), dist.get_world_size()
        self.down_proj = RowParallelLinear(mlp.down_proj, reduce_results=False)

    def forward(self, x, forward_batch=None):
        (own,) = self.inner
        neurons = own.act_fn(own.gate_proj(x)) * own.up_proj(x)
        x, _ = self.down_proj(neurons.chunk(self.ranks, -1)[self.rank])
        return x


class DecoderLayer(nn.Module):
    def __init__(self, layer: nn.Module, rotary: nn.Module):
        super().__init__()
        self.self_attn, self.mlp = Attention(layer.self_attn, rotary), MLP(layer.mlp)
        self.input_layernorm = RMSNorm(layer.input_layernorm)
        self.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm)
        self.attn_boundary = StageBoundary(self.input_layernorm)
        self.ffn_boundary = StageBoundary(self.post_attention_layernorm)

    def forward(self, positions, hidden_states, forward_batch, capture_output=None):
        u = self.attn_boundary.prepare(hidden_states, forward_batch, capture=capture_output)
        a = self.self_attn(positions=positions, hidden_states=u, forward_batch=forward_batch)
        u = self.ffn_boundary.prepare(self.attn_boundary.finish(a, forward_batch), forward_batch)
        return self.ffn_boundary.finish(self.mlp(u, forward_batch=forward_batch), forward_batch)


class CausalLM(nn.Module):
    """A model that SGLang would have loaded on this rank, made of transformers' own."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        name = type(model).__name__.removesuffix("ForCausalLM")
        place = {"__module__": f"sglang.srt.models.{name.lower()}"}
        layer_class = type(f"{name}DecoderLayer", (DecoderLayer,), place)
        self.__class__ = type(f"{name}ForCausalLM", (CausalLM,), place)
        inner = model.model
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layer_class(layer, inner.rotary_emb) for layer in inner.layers)
        self.embed, self.norm, self.lm_head = inner.embed_tokens, RMSNorm(inner.norm), model.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of token ids [T]; each rank's part of the vocabulary from its own stream."""
        batch = SimpleNamespace(residual_stream=ResidualStream())
        hidden, positions = self.embed(ids).clone(), torch.arange(len(ids))
        for layer in self.model.layers:
            hidden = layer(positions, hidden, batch, capture_output=None)
        x, _ = self.norm(summed(hidden, batch.residual_stream), batch.residual_stream.residual)
        own = x @ self.lm_head.weight.chunk(dist.get_world_size())[dist.get_rank()].T
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, -1)
