"""The projections o_proj and down_proj of an engine's layer, whose products a planned forward makes itself.

In a planned layer the attention and the MLP end before their projection: what they give is what enters it. So the debt
p can be added within the product, and predictors read the head outputs. Tensors are [..., d], or z [..., d_rank],
d_rank what a rank has of the projection's inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """One projection of rank `rank`; `scale` multiplies all that it gives, its bias, too.

    `linear` is the engine's module, of which the weight, the bias, params_dtype and quant_method are used. `in_place`:
    its weight lies open and torch multiplies by it, so that a product can be added to what is there. (Packed or
    quantised weights have products of their own, to which p is added afterwards.)
    """

    linear: Any
    rank: int
    scale: float = 1.0
    in_place: bool = False

    @property
    def bias(self) -> Tensor | None:
        """Return the whole bias [d], or None."""
        bias = self.linear.bias
        return None if bias is None else scaled(bias.to(self.linear.params_dtype), self.scale)

    def partial(self, z: Tensor) -> Tensor:
        """Return this rank's partial sum, the bias left out."""
        return scaled(self.linear.quant_method.apply(self.linear, z, None), self.scale)

    def onto(self, p: Tensor | None, z: Tensor) -> Tensor:
        """Return p plus this rank's partial sum. May work in place: p is nobody's afterwards."""
        if p is None:
            return self.partial(z)
        if not self.in_place:
            return p + self.partial(z)
        torch.ops.spd_calib.add_product_(p, z, self.linear.weight, self.scale)
        return p

    def addend(self, p: Tensor | None, z: Tensor) -> Tensor:
        """Return what this rank adds to the sum over all ranks: p, its partial sum, and on rank 0 the bias.

        Engines have one kernel for an all-reduce and the norm behind it, which a bias added in between would part.
        p is nobody's afterwards.
        """
        first = self.rank == 0
        if p is not None:
            return self.onto(add(p, self.bias) if first else p, z)
        bias = self.linear.bias if first else None
        return scaled(self.linear.quant_method.apply(self.linear, z, bias), self.scale)


@torch.library.custom_op("spd_calib::add_product_", mutates_args=("p",))
def add_product_(p: Tensor, z: Tensor, weight: Tensor, scale: float) -> None:
    """Add scale * z @ weight.T to p, in place; weight [d, d_rank].

    An operator, because a compiler that is shown p + z @ weight.T copies p before it adds the product to it.
    """
    p.view(-1, p.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), weight.t(), alpha=scale)


def add(a: Tensor, b: Tensor | None) -> Tensor:
    """Return a + b, or a where there is no b."""
    return a if b is None else a + b


def scaled(a: Tensor, scale: float) -> Tensor:
    """Return a * scale; a itself where scale is 1."""
    return a if scale == 1.0 else a * scale
