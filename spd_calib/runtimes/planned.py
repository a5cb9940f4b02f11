"""Telling one layer of an engine what a plan says of it, and running its attention's sync point where it is dropped.

docs/design.md, section 2: `x` is the part of the residual stream that all ranks share (after a plain drop: the rank's
own), `p` what the rank still owes the others, None where nothing is owed.
"""

from dataclasses import dataclass

from torch import Tensor

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.models.predictor import Predictor

from .projections import Projection, add

KEEP, BLOCK_DROP = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP


@dataclass(frozen=True)
class Planned:
    """Holds what a plan says of one layer: its two sync points, and their predictors.

    `predictor` and `mlp_predictor` are the rank's own, `router` that of what the router reads in a mixture of experts.
    `owes`: the layer before left a debt, or partial sums that wait. `last`: it is the last layer.
    """

    attention: Drop
    mlp: Drop
    predictor: Predictor | None = None
    router: Predictor | None = None
    mlp_predictor: Predictor | None = None
    owes: bool = False
    last: bool = False

    @property
    def writes_off(self) -> bool:
        """Say whether the attention's partial sum joins the rank's own stream for good."""
        return self.attention.strategy == Strategy.PLAIN_DROP


def at_dropped_attention(
    planned: Planned, o: Projection, *, x: Tensor, p: Tensor | None, heads: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return x and p behind the attention's dropped sync point, and what the MLP's norm reads; all [..., d].

    `heads` [..., d_rank] are this rank's head outputs, which enter o_proj. p is nobody's afterwards.
    """
    if planned.predictor is not None:
        a = o.partial(heads)
        x = add(x, o.bias)
        return x, add(a, p), add(x + planned.predictor(heads, a), p)
    if planned.writes_off:
        x = add(x + o.partial(heads), o.bias)
        return x, p, add(x, p)
    x, p = add(x, o.bias), o.onto(p, heads)
    return x, p, x + p
