"""The forward of a vLLM decoder layer that drops its sync points (docs/design.md, section 2).

`x` is the part of the residual stream that all ranks share (after a plain drop: the rank's own), `p` what the rank
still owes the others. Tensors are [N, d], N tokens of all requests in the batch, or [1, N, d] in transformers' own
layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_calib.runtimes.planned import KEEP, Planned, at_dropped_attention
from spd_calib.runtimes.projections import Projection, add

from .mixtures import Mixture
from .projections import all_reduced

Pair = tuple[Tensor, Tensor]
Stream = Tensor | Pair
"""The residual stream between two layers that pass it alone: x, or (x, p) where p is owed."""


@dataclass(frozen=True)
class Parts:
    """The parts of a layer that its planned forward calls.

    The out norms are those that a branch goes through before it is added, `stream_scale` [1] the number by which the
    layer multiplies the whole stream in the end, where there are any.
    """

    norm1: Any
    norm2: Any
    o: Projection
    down: Projection | Mixture
    attention_out_norm: Any = None
    mlp_out_norm: Any = None
    stream_scale: Tensor | None = None


def fused(
    layer: Any, parts: Parts, planned: Planned, *, attend: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Callable[..., Pair]:
    """Return a forward of Llama's kind: it takes and gives (hidden, residual), which norms add up as they go.

    Between two layers, hidden is the sum of the MLP before; where that owes its all-reduce, it is the debt p.
    `attend(positions, u)` gives what enters o_proj, where it is not `self_attn` called by these names.
    """
    attend = attend or _attention(layer)
    norm1, norm2, o, down = parts.norm1, parts.norm2, parts.o, parts.down
    at_attention, at_mlp, owes = planned.attention.strategy, planned.mlp.strategy, planned.owes

    def forward(positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_: Any) -> Pair:
        p = None
        if residual is None:
            u, x = norm1(hidden_states), hidden_states
        elif owes:
            u, x, p = norm1(residual + hidden_states), residual, hidden_states
        else:
            u, x = norm1(hidden_states, residual)

        expected = _expected(planned, norm1, x=x, p=p, u=u)
        heads = attend(positions, u)
        if at_attention == KEEP:
            (u, x), p = norm2(all_reduced(o.addend(p, heads)), x), None
        elif planned.writes_off and p is None:
            u, x = norm2(add(o.partial(heads), o.bias), x)
        else:
            x, p, read = at_dropped_attention(planned, o, x=x, p=p, heads=heads)
            u = norm2(read)

        neurons = _neurons(parts, planned, u=u, x=x, expected=expected, feed=lambda v: layer.mlp(v))
        if at_mlp == KEEP:
            return all_reduced(down.addend(p, neurons)), x
        return down.onto(p, neurons), add(x, _bias(down, neurons))

    return forward


def _attention(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the layer's attention, of positions and what it reads; a linear one has no use for positions."""
    if hasattr(layer, "linear_attn"):
        return lambda positions, u: layer.linear_attn(hidden_states=u)
    return lambda positions, u: layer.self_attn(positions=positions, hidden_states=u)


def deepseek(layer: Any, parts: Parts, planned: Planned) -> Callable[..., Pair]:
    """Return the forward of vLLM's DeepSeek layer; what it is given last is None in all models on the list."""
    step = fused(layer, parts, planned, attend=lambda positions, u: layer.self_attn(positions, u, None))

    def forward(positions: Tensor, hidden_states: Tensor, residual: Tensor | None, _: None = None) -> Pair:
        return step(positions, hidden_states, residual)

    return forward


def gpt_oss(layer: Any, parts: Parts, planned: Planned) -> Callable[..., Pair]:
    """Return the forward of vLLM's GPT-OSS layer, which takes its arguments in another order."""
    step = fused(layer, parts, planned, attend=lambda positions, u: layer.attn(u, positions))

    def forward(hidden_states: Tensor, positions: Tensor, residual: Tensor | None) -> Pair:
        return step(positions, hidden_states, residual)

    return forward


def _expected(planned: Planned, norm1: Any, *, x: Tensor, p: Tensor | None, u: Tensor) -> Tensor | None:
    """Return what the router's predictor expects the attention to add to x [..., d]; None where there is no such one.

    It reads norm1(x), which is the u that the attention reads where nothing is owed.
    """
    if planned.router is None:
        return None
    shared = u if p is None else norm1(x)
    return planned.router(shared, torch.zeros_like(shared))


def _neurons(parts: Parts, planned: Planned, *, u: Tensor, x: Tensor, expected: Tensor | None, feed: Any) -> Any:
    """Return what enters down_proj: what `feed` gives where it reads u, or what a mixture of experts gives.

    Its router reads what all ranks share behind the attention, x and what is `expected` beside it.
    """
    if not isinstance(parts.down, Mixture):
        return feed(u)
    shared = u if planned.attention.strategy == KEEP else parts.norm2(add(x, expected))
    return parts.down.fed(u, shared, deferred=planned.mlp.strategy != KEEP)


def _bias(down: Projection | Mixture, neurons: Any) -> Tensor | None:
    """Return the bias [d] behind the MLP, or that of the experts chosen for each token [N, d]; None without one."""
    return neurons.bias if isinstance(down, Mixture) else down.bias


def unfused(call: Callable[..., Callable]) -> Callable[..., Callable]:
    """Return what makes the forward of a layer that passes the residual stream alone.

    `call(layer, block)` gives the forward as the model calls it, where `block(stream, attend, feed)` is the layer's
    computation: attend(u) gives what enters o_proj, feed(u) what enters down_proj.
    """

    def forward_of(layer: Any, parts: Parts, planned: Planned) -> Callable:
        norm1, norm2, o, down = parts.norm1, parts.norm2, parts.o, parts.down
        at_attention, at_mlp = planned.attention.strategy, planned.mlp.strategy

        def block(stream: Stream, attend: Callable[[Tensor], Tensor], feed: Callable[[Tensor], Tensor]) -> Stream:
            x, p = stream if isinstance(stream, tuple) else (stream, None)
            u = norm1(add(x, p))
            expected = _expected(planned, norm1, x=x, p=p, u=u)
            heads = attend(u)
            if at_attention == KEEP:
                x, p = x + all_reduced(o.addend(p, heads)), None
                read = x
            else:
                x, p, read = at_dropped_attention(planned, o, x=x, p=p, heads=heads)

            neurons = _neurons(parts, planned, u=norm2(read), x=x, expected=expected, feed=feed)
            if at_mlp == KEEP:
                return x + all_reduced(down.addend(p, neurons))
            return add(x, _bias(down, neurons)), down.onto(p, neurons)

        return call(layer, block)

    return forward_of


def opt(layer: Any, block: Callable[..., Stream]) -> Callable[[Stream], Stream]:
    """Return the forward of vLLM's OPT layer, which has its MLP's parts beside the attention."""

    def forward(hidden_states: Stream) -> Stream:
        def feed(u: Tensor) -> Tensor:
            neurons, _ = layer.fc1(u)
            return layer.fc2(layer.activation_fn(neurons))[0]

        return block(hidden_states, lambda u: layer.self_attn(hidden_states=u), feed)

    return forward


def granite(layer: Any, block: Callable[..., Stream]) -> Callable[..., Stream]:
    """Return the forward of vLLM's Granite layers, dense and with experts; the latter have no `mlp`."""

    def forward(positions: Tensor, hidden_states: Stream) -> Stream:
        attend = lambda u: layer.self_attn(positions=positions, hidden_states=u)  # noqa: E731
        return block(hidden_states, attend, lambda u: layer.mlp(u))

    return forward


def with_unused_residual(layer: Any, block: Callable[..., Stream]) -> Callable[..., tuple[Stream, None]]:
    """Return the forward of vLLM's StableLM and HyperCLOVA X layers: beside the stream they give what nobody reads."""

    def forward(positions: Tensor, hidden_states: Stream, residual: None = None) -> tuple[Stream, None]:
        return granite(layer, block)(positions, hidden_states), None

    return forward


def transformers_layer(layer: Any, block: Callable[..., Stream]) -> Callable[..., Stream]:
    """Return the forward of a decoder layer of transformers' own, as vLLM's Transformers backend calls it."""

    def forward(hidden_states: Stream, *args: Any, **kwargs: Any) -> Stream:
        return block(hidden_states, lambda u: layer.self_attn(u, *args, **kwargs)[0], layer.mlp)

    return forward
