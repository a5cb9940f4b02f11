"""The row-parallel projections o_proj and down_proj of a vLLM layer, whose products the planned forward makes itself.

In a planned layer the attention and the MLP end before their projection (`ending_before`): what they give is what
enters it. So the debt p can be added within the product, and predictors read the head outputs. Tensors are [..., d], or
z [..., d_rank], d_rank what a rank has of the projection's inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """One projection; `scale` multiplies all that it gives, its bias, too.

    `in_place`: its weight lies open and torch multiplies by it, so that a product can be added to what is there.
    (Packed or quantised weights have products of their own, to which p is added afterwards.)
    """

    linear: Any
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

    def reduced(self, p: Tensor | None, z: Tensor) -> Tensor:
        """Return the sum over all ranks of p and the partial sums, and the bias. p is nobody's afterwards.

        Rank 0 adds the bias before the sum, as vLLM does: what is reduced goes straight into the next norm, and vLLM
        finds the pair that it has one kernel for.
        """
        first = self.linear.tp_rank == 0
        if p is not None:
            return all_reduced(self.onto(add(p, self.bias) if first else p, z))
        bias = self.linear.bias if first else None
        return all_reduced(scaled(self.linear.quant_method.apply(self.linear, z, bias), self.scale))


@torch.library.custom_op("spd_calib::add_product_", mutates_args=("p",))
def add_product_(p: Tensor, z: Tensor, weight: Tensor, scale: float) -> None:
    """Add scale * z @ weight.T to p, in place; weight [d, d_rank].

    An operator, because a compiler that is shown p + z @ weight.T copies p before it adds the product to it.
    """
    p.view(-1, p.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), weight.t(), alpha=scale)


def open_projection(linear: Any, scale: float = 1.0) -> Projection:
    """Return the Projection of a loaded RowParallelLinear, in place where vLLM itself calls torch's product."""
    from vllm import envs
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    by_torch = getattr(linear.quant_method, "_gemm_impl", None) is default_unquantized_gemm
    return Projection(linear, scale, in_place=by_torch and not envs.VLLM_BATCH_INVARIANT)


def ending_before(linear: Any) -> Callable[[Tensor], Any]:
    """Return a forward of a RowParallelLinear that gives what it is given, in the shape that its caller unpacks."""
    with_bias = linear.return_bias

    def forward(z: Tensor) -> Any:
        return (z, None) if with_bias else z

    return forward


def add(a: Tensor, b: Tensor | None) -> Tensor:
    """Return a + b, or a where there is no b."""
    return a if b is None else a + b


def scaled(a: Tensor, scale: float) -> Tensor:
    """Return a * scale; a itself where scale is 1."""
    return a if scale == 1.0 else a * scale


def all_reduced(partial: Tensor) -> Tensor:
    """Return the sum over all ranks. Works in place on a CPU: `partial` is nobody's afterwards."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(partial)
