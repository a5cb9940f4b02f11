"""The forward of a vLLM layer whose branches go through a norm before they are added to the residual stream.

What such a branch adds is known from the whole sum alone, so partial sums wait side by side for the next sync point
that is kept, and one all-reduce settles them. That is `spd_calib.parallel.streams`, here with vLLM's all-reduce.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.streams import Branch, Streams, defer, keep, times, write_off
from spd_calib.runtimes.planned import Planned
from spd_calib.runtimes.projections import Projection

from .forwards import Parts
from .projections import all_reduced


class _Engine:
    """The `Comm` of one rank in vLLM."""

    def all_reduce(self, partials: Iterable[Tensor], *, bits: int | None = None) -> Tensor:
        assert bits is None  # a plan with quantised syncs is refused
        (partial,) = partials
        return all_reduced(partial)


def behind_norms(call: Callable[..., Callable]) -> Callable[..., Callable]:
    """Return what makes the forward of a layer whose branches go through a norm.

    `call(layer, block, last)` gives the forward as the model calls it, where `block(streams, attend, feed)` is the
    layer's computation: attend(u) gives what enters o_proj, feed(u) what enters down_proj.
    """

    def forward_of(layer: Any, parts: Parts, planned: Planned) -> Callable:
        o, down = parts.o, parts.down
        assert isinstance(down, Projection)  # no form has experts in front of a norm
        attention, mlp = _branch(o, parts.attention_out_norm), _branch(down, parts.mlp_out_norm)

        def block(s: Streams, attend: Callable[[Tensor], Tensor], feed: Callable[[Tensor], Tensor]) -> Streams:
            heads = attend(parts.norm1(s.read(0)))
            a = o.partial(heads)
            s = _sync_point(planned.attention, s, a, attention, predictor=planned.predictor, z=heads)
            m = down.partial(feed(parts.norm2(s.read(0))))
            s = _sync_point(planned.mlp, s, m, mlp, predictor=planned.mlp_predictor, z=m)
            return s if parts.stream_scale is None else times(s, parts.stream_scale)

        return call(layer, block, planned.last)

    return forward_of


def _branch(projection: Projection, norm: Callable[[Tensor], Tensor]) -> Branch:
    return Branch(projection.bias, norm)


def _sync_point(
    drop: Drop, s: Streams, partial: Tensor, branch: Branch, *, predictor: Predictor | None, z: Tensor
) -> Streams:
    """Return the streams behind a sync point; z is what its predictor, if any, reads beside this rank's share."""
    if drop.strategy == Strategy.KEEP_SYNC:
        return keep(s, [partial], branch, _Engine())  # type: ignore[arg-type]  # nothing else of a Comm is used
    if drop.strategy == Strategy.PLAIN_DROP:
        return write_off(s, [partial], branch)
    estimates = None if predictor is None else [predictor(z, branch(partial))]
    return defer(s, [partial], branch, estimates=estimates)


def sandwich(layer: Any, block: Callable[..., Streams], last: bool) -> Callable[..., tuple[Any, Tensor | None]]:
    """Return the forward of vLLM's Gemma 2, Gemma 3 and GLM-4 layers.

    Theirs give (hidden, residual), the stream being the sum of both. These give the whole stream and None, as in front
    of the first layer, and behind the last layer, whose successor is a norm that wants both, the stream and zeros.
    """

    def forward(positions: Tensor, hidden_states: Any, residual: Tensor | None, **_: Any) -> tuple[Any, Tensor | None]:
        x = hidden_states if residual is None else hidden_states + residual
        s = block(Streams.of(x), lambda u: layer.self_attn(positions=positions, hidden_states=u), layer.mlp)
        y = _own(s)
        return y, torch.zeros_like(y) if last else None

    return forward


def stream_alone(layer: Any, block: Callable[..., Streams], last: bool) -> Callable[..., tuple[Any, None]]:
    """Return the forward of vLLM's Exaone 4 and Gemma 4 layers: the stream alone, and beside it what nobody reads."""

    def forward(positions: Tensor, hidden_states: Any, residual: Tensor | None, *_: Any, **__: Any) -> tuple[Any, None]:
        attend = lambda u: layer.self_attn(positions=positions, hidden_states=u)  # noqa: E731
        return _own(block(Streams.of(hidden_states), attend, layer.mlp)), None

    return forward


def _own(s: Streams) -> Any:
    """Return the rank's own stream where nothing waits, as layers that drop nothing read it; else the streams."""
    return s.read(0) if s.settled else s
