"""The forward of an SGLang decoder layer that drops its sync points (docs/design.md, section 2).

SGLang's projections give partial sums; the two stage boundaries of a layer sum over the ranks, and keep the residual
stream in the batch (`forward_batch.residual_stream`), where the next norm adds to it. Where a sync point is kept, they
are called as SGLang's own layer calls them: with the debt in what they sum, they still take the kernel that sums, adds
and norms at once. Tensors are [N, d], N tokens of all requests in the batch.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from spd_calib.runtimes.planned import KEEP, Planned, at_dropped_attention
from spd_calib.runtimes.projections import Projection, add


def planned_forward(layer: Any, planned: Planned, *, rank: int) -> Callable[..., Tensor]:
    """Return the forward that takes the place of a layer's own.

    Between two layers the stream is where SGLang keeps it, and what is handed on is the MLP's sum, as a handle; where
    the MLP's sync point is dropped, it is the debt p.
    """
    o, down = (Projection(linear, rank=rank) for linear in (layer.self_attn.o_proj, layer.mlp.down_proj))
    at_attention, at_mlp, owes = planned.attention.strategy, planned.mlp.strategy, planned.owes
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm

    def forward(
        positions: Tensor,
        hidden_states: Any,
        forward_batch: Any,
        post_residual_addition: Tensor | None = None,
        capture_output: Any = None,
    ) -> Any:
        # a plan is refused where hidden states are read in between, and models that add to them are not on the list
        assert post_residual_addition is None and capture_output is None
        if owes:
            p = hidden_states
            u = norm1(forward_batch.residual_stream.residual + p)
        else:
            u, p = layer.attn_boundary.prepare(hidden_states, forward_batch), None

        heads = layer.self_attn(positions=positions, hidden_states=u, forward_batch=forward_batch)
        if at_attention == KEEP:
            handle, p = layer.attn_boundary.finish(o.addend(p, heads), forward_batch), None
            u = layer.ffn_boundary.prepare(handle, forward_batch)
        else:
            stream = forward_batch.residual_stream
            x, p, read = at_dropped_attention(planned, o, x=stream.residual, p=p, heads=heads)
            stream.write(x)
            u = norm2(read)

        neurons = layer.mlp(u, forward_batch=forward_batch)
        if at_mlp == KEEP:
            return layer.ffn_boundary.finish(down.addend(p, neurons), forward_batch)
        stream = forward_batch.residual_stream
        stream.write(add(stream.residual, down.bias))
        return down.onto(p, neurons)

    return forward


def ending_before(linear: nn.Module) -> Callable[..., tuple[Tensor, None]]:
    """Return a forward of a RowParallelLinear that gives what it is given, in the shape that its caller unpacks."""

    def forward(input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return input_, None

    return forward
