"""The mixture of experts of a vLLM layer, which in a planned layer gives its rank's partial sum.

Its router and its experts may read two different things there: the router what all ranks share, each rank's experts
what that rank knows besides. vLLM's own module calls both with one input, so the planned layer calls them itself.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.runtimes.projections import add

RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner"


@dataclass(frozen=True)
class Mixture:
    """A layer's module with `gate`, the router, and `experts`, vLLM's runner of them and of the shared ones.

    In a planned layer it stands where a Projection stands in a dense one; what "enters" it is its partial sum.
    """

    module: Any

    @property
    def bias(self) -> None:
        """Return None: none of the experts on the list has biases."""
        return None

    def partial(self, u: Tensor, shared: Tensor) -> Tensor:
        """Return this rank's partial sum [N, d] where its experts read u and the router reads `shared`."""
        logits, _ = self.module.gate(shared)
        return self.module.experts(u, logits)

    def onto(self, p: Tensor | None, m: Tensor) -> Tensor:
        """Return the partial sum m plus p."""
        return add(m, p)

    def addend(self, p: Tensor | None, m: Tensor) -> Tensor:
        """Return what this rank adds to the sum over all ranks: the partial sum m, and p."""
        return add(m, p)


def is_mixture(module: Any) -> bool:
    """Tell whether a layer's module is a mixture of experts, and not a dense MLP."""
    return hasattr(module, "experts")


def check_mixture(module: Any, *, block: int) -> None:
    """Raise InputError where what vLLM's ranks compute of a mixture is no partial sum that could wait."""
    runner = module.experts
    config, place = runner.moe_config, f"{type(runner).__module__}.{type(runner).__name__}"
    if place != RUNNER:
        raise InputError(f"vLLM runs the experts of block {block} by {place}, which spd-calib does not know: no plan.")
    found = (
        ("whole experts lie on ranks (expert parallel)", config.moe_parallel_config.use_ep),
        ("each rank has tokens of its own (sequence parallel)", config.is_sequence_parallel),
        ("its kernel sums over the ranks itself", runner._fused_output_is_reduced),
        ("what the experts give is transformed", runner.routed_output_transform is not None),
    )
    if why := next((why for why, used in found if used), None):
        raise InputError(f"The experts' sum of block {block} cannot wait in vLLM: {why}; start it otherwise.")


def end_before_sum(module: Any, ends: bool) -> None:
    """Make a mixture's experts end before the sum over ranks, with routers called from outside; or as vLLM has it."""
    runner = module.experts
    runner.moe_config.skip_final_all_reduce = ends
    own = vars(runner).setdefault("gate_before_spd_calib", runner.gate)  # some runners call the router themselves
    if own is not None:
        runner.gate = None if ends else own
