"""The mixture of experts of a vLLM layer, which in a planned layer gives its rank's partial sum.

Its router and its experts may read two different things there: the router what all ranks share, each rank's experts
what that rank knows besides. vLLM's own module calls both with one input, so the planned layer calls them itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.runtimes.projections import add, scaled

from .projections import all_reduced

RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner"


class Fed(NamedTuple):
    """Holds what a mixture of experts gives for N tokens: this rank's partial sum [N, d], and the bias left out."""

    partial: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Mixture:
    """A layer's `gate`, the router, and `runner`, vLLM's, of its experts and the shared ones; `scale` multiplies all.

    In a planned layer it stands where a Projection stands in a dense one; what "enters" it is what it has Fed.
    `biases` [E, d], where its experts have any, are known to every rank; vLLM has rank 0 add them.
    """

    gate: Any
    runner: Any
    rank: int
    scale: float = 1.0
    biases: Tensor | None = None

    def fed(self, u: Tensor, shared: Tensor, *, deferred: bool) -> Fed:
        """Return what experts give that read u [N, d] where the router reads `shared` [N, d].

        Without their biases where the sum over the ranks is `deferred`: all ranks know them, so that they can join the
        shared stream at once.
        """
        logits = logits_of(self.gate(shared))
        partial = scaled(self.runner(u, logits), self.scale)
        if self.biases is None or not deferred:
            return Fed(partial)
        weights, chosen = self.runner.router._compute_routing(shared, logits, None)
        of_chosen = self.biases[chosen.long(), : partial.shape[-1]]  # [N, k, d]; kernels may want them padded
        bias = scaled((weights[..., None] * of_chosen).sum(1), self.scale).to(partial.dtype)
        return Fed(partial - bias if self.rank == 0 else partial, bias)

    def onto(self, p: Tensor | None, fed: Fed) -> Tensor:
        """Return this rank's partial sum plus p."""
        return add(fed.partial, p)

    def addend(self, p: Tensor | None, fed: Fed) -> Tensor:
        """Return what this rank adds to the sum over all ranks: its partial sum, and p."""
        return add(fed.partial, p)


def logits_of(given: Any) -> Tensor:
    """Return the logits [N, E] in what vLLM's module of a router gives, with a bias beside them or without."""
    return given[0] if isinstance(given, tuple) else given


def open_mixture(module: Any, *, gate: str, rank: int, scale: float) -> Mixture:
    """Return the Mixture of a layer's module with `experts` and a router by the name `gate`."""
    runner = module.experts
    return Mixture(getattr(module, gate), runner, rank=rank, scale=scale, biases=_biases(runner))


def _biases(runner: Any) -> Tensor | None:
    """Return the biases of the experts [E, d], on ranks but the first only once `share_biases` has been called."""
    own = getattr(runner.routed_experts, "w2_bias", None)
    return own if own is None else vars(runner).setdefault("biases_of_spd_calib", own.detach().clone())


def share_biases(modules: Iterable[Any]) -> None:
    """Tell every rank the biases of these mixtures' experts, which vLLM loads on rank 0 alone: a sum over all ranks.

    To be called by all ranks, before the first forward.
    """
    for runner in (module.experts for module in modules):
        if (biases := _biases(runner)) is not None and "shared_by_spd_calib" not in vars(runner):
            biases.copy_(all_reduced(biases.clone()))
            runner.shared_by_spd_calib = True


def is_mixture(module: Any) -> bool:
    """Tell whether a layer's module is a mixture of experts, and not a dense MLP."""
    return hasattr(module, "experts")


def check_mixture(module: Any, *, block: int, routers: Iterable[tuple[str, Any]] = ()) -> None:
    """Raise InputError where what vLLM's ranks compute of a mixture is no partial sum that could wait, or another.

    `routers`: what its router's attributes must be.
    """
    runner = module.experts
    config, place = runner.moe_config, f"{type(runner).__module__}.{type(runner).__name__}"
    if place != RUNNER:
        raise InputError(f"vLLM runs the experts of block {block} by {place}, which spd-calib does not know: no plan.")
    found = (
        ("whole experts lie on ranks (expert parallel)", config.moe_parallel_config.use_ep),
        ("each rank has tokens of its own (sequence parallel)", config.is_sequence_parallel),
        ("its kernel sums over the ranks itself", runner._fused_output_is_reduced),
        ("what the experts give is transformed", runner.routed_output_transform is not None),
        ("its shared expert lies whole on every rank", getattr(module, "replicate_shared_expert", False)),
        ("its shared expert is one of the others", getattr(module, "is_fused_shared_expert_enabled", False)),
    )
    of_router = [(name, value, getattr(runner.router, name, None)) for name, value in routers]
    computed = (
        (
            "in float16 it divides sums by routed_scaling_factor",
            config.in_dtype == torch.float16 and runner.routed_scaling_factor != 1.0,
        ),
        *((f"the router's {name} is {found}", found != value) for name, value, found in of_router),
        ("its router on a CPU leaves the correction bias of the experts out", _leaves_correction_out(runner.router)),
    )
    if why := next((why for why, used in found if used), None):
        raise InputError(f"The experts' sum of block {block} cannot wait in vLLM: {why}; start it otherwise.")
    if why := next((why for why, used in computed if used), None):
        raise InputError(f"vLLM computes something else than the model in block {block}: {why}; no plan.")


def _leaves_correction_out(router: Any) -> bool:
    """Say whether a router chooses without the experts' correction bias, as vLLM's on a CPU does without groups."""
    correction = getattr(router, "e_score_correction_bias", None)
    ungrouped = type(router).__name__ == "CPURouter" and not router.use_grouped_topk
    return ungrouped and correction is not None and bool(correction.any())


def end_before_sum(module: Any, ends: bool) -> None:
    """Make a mixture's experts end before the sum over ranks, with routers called from outside; or as vLLM has it."""
    runner = module.experts
    runner.moe_config.skip_final_all_reduce = ends
    own = vars(runner).setdefault("gate_before_spd_calib", runner.gate)  # some runners call the router themselves
    if own is not None:
        runner.gate = None if ends else own
