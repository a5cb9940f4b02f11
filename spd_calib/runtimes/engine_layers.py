"""Putting a forward of ours in the place of an engine's own, and this rank's predictors beside its o_proj."""

from typing import Any

import torch
from torch import nn

from spd_calib.errors import InputError
from spd_calib.formats.drops import SUBLAYERS, Drop, Drops, Point
from spd_calib.models.predictor import Predictor, check_predictors, check_router_predictor


def check_sync_points(drops: Drops, *, blocks: int, engine: str) -> None:
    """Raise InputError where `drops` name sync points that the model of `blocks` layers an engine loaded lacks."""
    try:
        drops.check_fits(blocks)
    except ValueError as e:
        raise InputError(f"The plan does not fit the model that {engine} loaded: {e}.") from None


def fitted_at(point: Point, drop: Drop, *, o_proj: Any, rank: int) -> Predictor:
    """Return the predictor of a sync point: an MLP's reads this rank's partial sum itself, which is as wide as all."""
    read = o_proj.input_size_per_partition if point.sync_point == "attention" else o_proj.output_size
    return fitted(o_proj, drop, block=point.block, d_rank=read, rank=rank)


def fitted(o_proj: Any, drop: Drop, *, block: int, d_rank: int, rank: int) -> Predictor:
    """Return this rank's predictor of `drop` where o_proj is and in its dtype; `d_rank`: values it reads.

    Raises InputError where there is none for this rank, or where its shapes are others.
    """
    assert drop.predictors is not None
    if rank not in drop.predictors:
        raise InputError(f"Block {block} has no predictor for rank {rank}.")
    own = {rank: drop.predictors[rank]}
    check_predictors(block, own, d_rank=d_rank, d=o_proj.output_size)
    return own[rank].like(_as_computed(o_proj))


def fitted_router(o_proj: Any, router: Predictor, *, block: int) -> Predictor:
    """Return the predictor of a block's router, as `fitted` does a rank's own. Raises InputError for other shapes."""
    check_router_predictor(block, router, d=o_proj.output_size)
    return router.like(_as_computed(o_proj))


def _as_computed(o_proj: Any) -> torch.Tensor:
    """Return an empty tensor where o_proj is and in the dtype that it computes in."""
    weight = next(o_proj.parameters())  # which may be packed, so that its dtype says nothing
    return torch.empty(0, device=weight.device, dtype=o_proj.params_dtype)


def applied(drops: Drops, *, digest: str, blocks: int) -> str:
    """Return the line that a rank logs once it has applied the plan of this digest to a model of `blocks` blocks."""
    compensated = sum(drops.at(point).predictors is not None for point in drops)
    return (
        f"spd-calib: plan {digest[:12]}, {len(drops)} of {len(SUBLAYERS) * blocks} sync points dropped, "
        f"{compensated} compensated"
    )


def refuse_foreign_forward(module: nn.Module, *, block: int, engine: str) -> None:
    """Raise InputError where `module` runs another forward than its class's or one of ours: it would be lost."""
    forward = vars(module).get("forward")
    if forward is not None and not hasattr(forward, "of_spd_calib"):
        raise InputError(
            f"Something has wrapped the forward of block {block}'s {type(module).__name__}, as weight offloading does, "
            f"and a plan would take its place; start {engine} without it, or without the plan."
        )


def set_forward(module: Any, forward: Any) -> None:
    """Make `module` run `forward`; with None, its class's own again."""
    vars(module).pop("forward", None)
    if forward is not None:
        forward.of_spd_calib = True
        module.forward = forward
