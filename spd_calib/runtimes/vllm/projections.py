"""Making of vLLM's row-parallel projections what a planned forward calls (`spd_calib.runtimes.projections`)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spd_calib.runtimes.projections import Projection


def open_projection(linear: Any, scale: float = 1.0) -> Projection:
    """Return the Projection of a loaded RowParallelLinear, in place where vLLM itself calls torch's product."""
    from vllm import envs
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    by_torch = getattr(linear.quant_method, "_gemm_impl", None) is default_unquantized_gemm
    in_place = by_torch and not envs.VLLM_BATCH_INVARIANT
    return Projection(linear, rank=linear.tp_rank, scale=scale, in_place=in_place)


def ending_before(linear: Any) -> Callable[[Tensor], Any]:
    """Return a forward of a RowParallelLinear that gives what it is given, in the shape that its caller unpacks."""
    with_bias = linear.return_bias

    def forward(z: Tensor) -> Any:
        return (z, None) if with_bias else z

    return forward


def all_reduced(partial: Tensor) -> Tensor:
    """Return the sum over all ranks. Works in place on a CPU: `partial` is nobody's afterwards."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(partial)
