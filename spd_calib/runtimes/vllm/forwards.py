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

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.models.predictor import Predictor

KEEP, BLOCK_DROP = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP
Pair = tuple[Tensor, Tensor]
Stream = Tensor | Pair
"""The residual stream between two layers that pass it alone: x, or (x, p) where p is owed."""


@dataclass(frozen=True)
class Parts:
    """The parts of a layer that its planned forward calls, and the number by which both branches are multiplied."""

    norm1: Any
    norm2: Any
    o: Any
    down: Any
    scale: float = 1.0


def fused(layer: Any, parts: Parts, *, attention: Drop, mlp: Drop, owes: bool) -> Callable[..., Pair]:
    """Return a forward of Llama's kind: it takes and gives (hidden, residual), which norms add up as they go.

    `owes`: the layer before left a debt. Between two layers, hidden is the sum of the MLP before; where that owes its
    all-reduce, it is the debt p.
    """
    norm1, norm2 = parts.norm1, parts.norm2
    o_bias, down_bias = parts.o.bias, parts.down.bias
    predicts, at_attention, at_mlp = attention.predictors is not None, attention.strategy, mlp.strategy

    def forward(positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_: Any) -> Pair:
        p = None
        if residual is None:
            u, x = norm1(hidden_states), hidden_states
        elif owes:
            u, x, p = norm1(residual + hidden_states), residual, hidden_states
        else:
            u, x = norm1(hidden_states, residual)

        a = layer.self_attn(positions=positions, hidden_states=u)
        if predicts:
            a, predicted = a.chunk(2, -1)
            x = _add(x, o_bias)
            u, p = norm2(_add(x + predicted, p)), _add(a, p)
        elif at_attention == KEEP:
            (u, x), p = norm2(_add(_all_reduce(_add(a, p)), o_bias), x), None
        elif at_attention == BLOCK_DROP:
            x, p = _add(x, o_bias), _add(a, p)
            u = norm2(x + p)
        elif p is None:
            u, x = norm2(_add(a, o_bias), x)
        else:
            x = _add(x + a, o_bias)
            u = norm2(x + p)

        m = layer.mlp(u)
        if at_mlp == KEEP:
            return _add(_all_reduce(_add(m, p)), down_bias), x
        return _add(m, p), _add(x, down_bias)

    return forward


def unfused(call: Callable[..., Callable]) -> Callable[..., Callable]:
    """Return what makes the forward of a layer that passes the residual stream alone.

    `call(layer, block)` gives the forward as the model calls it, where `block(stream, attend, feed)` is the layer's
    computation: attend(u) gives the attention's output, feed(u) the MLP's.
    """

    def planned(layer: Any, parts: Parts, *, attention: Drop, mlp: Drop, owes: bool) -> Callable:
        s = parts.scale
        o_bias, down_bias = _scaled(parts.o.bias, s), _scaled(parts.down.bias, s)
        predicts, at_attention, at_mlp = attention.predictors is not None, attention.strategy, mlp.strategy

        def block(stream: Stream, attend: Callable[[Tensor], Tensor], feed: Callable[[Tensor], Tensor]) -> Stream:
            x, p = stream if isinstance(stream, tuple) else (stream, None)
            a, read = attend(parts.norm1(_add(x, p))), None
            if predicts:
                a, predicted = a.chunk(2, -1)
                x = _add(x, o_bias)
                read, p = _add(x + predicted, p), _add(a, p)
            elif at_attention == KEEP:
                x, p = _add(x + _all_reduce(_add(_scaled(a, s), p)), o_bias), None
            elif at_attention == BLOCK_DROP:
                x, p = _add(x, o_bias), _add(_scaled(a, s), p)
            else:
                x = _add(x + _scaled(a, s), o_bias)

            m = _scaled(feed(parts.norm2(_add(x, p) if read is None else read)), s)
            if at_mlp == KEEP:
                return _add(x + _all_reduce(_add(m, p)), down_bias)
            return _add(x, down_bias), _add(m, p)

        return call(layer, block)

    return planned


def opt(layer: Any, block: Callable[..., Stream]) -> Callable[[Stream], Stream]:
    """Return the forward of vLLM's OPT layer, which has its MLP's parts beside the attention."""

    def forward(hidden_states: Stream) -> Stream:
        def feed(u: Tensor) -> Tensor:
            neurons, _ = layer.fc1(u)
            return layer.fc2(layer.activation_fn(neurons))[0]

        return block(hidden_states, lambda u: layer.self_attn(hidden_states=u), feed)

    return forward


def granite(layer: Any, block: Callable[..., Stream]) -> Callable[..., Stream]:
    """Return the forward of vLLM's Granite layer."""

    def forward(positions: Tensor, hidden_states: Stream) -> Stream:
        return block(hidden_states, lambda u: layer.self_attn(positions=positions, hidden_states=u), layer.mlp)

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


def predicting(o_proj: Any, predictor: Predictor, *, scale: float = 1.0) -> Callable[[Tensor], Any]:
    """Return a forward of o_proj that gives the partial sum, times `scale`, and behind it what the MLP reads for it.

    The result is [..., 2d]. Here alone are the head outputs at hand; the attention hands on what o_proj gives.
    """
    partial_sum, with_bias = type(o_proj).forward, o_proj.return_bias

    def forward(heads: Tensor) -> Any:
        given = partial_sum(o_proj, heads)
        partial = _scaled(given[0] if with_bias else given, scale)
        both = torch.cat((partial, predictor(heads, partial)), -1)
        return (both, None) if with_bias else both

    return forward


def _add(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _scaled(a: Any, scale: float) -> Any:
    return a if a is None or scale == 1.0 else a * scale


def _all_reduce(partial: Tensor) -> Tensor:
    """Return the sum over all ranks. Works in place on a CPU: `partial` is nobody's afterwards."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(partial)
