"""Making a loaded vLLM model run what a plan drops, layer by layer, and taking it back."""

from typing import Any

import torch
from torch import nn

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point
from spd_calib.models.predictor import Predictor, check_predictors, check_router_predictor

from .forms import find
from .forwards import KEEP, Planned
from .mixtures import end_before_sum
from .projections import ending_before


def apply(model: nn.Module, drops: Drops) -> None:
    """Make a loaded vLLM model run `drops`, which hold this rank's predictors; undoes what was applied before.

    Layers with nothing to drop keep vLLM's own forward. Raises InputError, before anything is changed, for a model
    that is not on the list (forms.py), for sync points it does not have, for predictors that do not fit it, and where
    somebody else has put a forward of their own around a layer.
    """
    form, layers = find(model)
    try:
        drops.check_fits(len(layers))
    except ValueError as e:
        raise InputError(f"The plan does not fit the model that vLLM loaded: {e}.") from None
    mixtures = [form.mixture_of(layer) for layer in layers]
    if drops.streams_differ and any(mixtures):
        raise InputError("Ranks whose streams differ for good (plain_drop) would choose different experts: no plan.")
    for i, layer in enumerate(layers):
        for module in (layer, *form.linears(layer), *((m, m.gate, m.experts) if (m := mixtures[i]) else ())):
            _refuse_foreign_forward(module, i)
    predictors = {
        point: _fitted_at(point, drops.at(point), o_proj=layers[point.block].get_submodule(form.o))
        for point in drops
        if drops.at(point).predictors is not None
    }
    routers = {
        point.block: fitted_router(layers[point.block].get_submodule(form.o), router, block=point.block)
        for point in drops
        if (router := drops.at(point).router) is not None
    }
    if lacking := sorted(block for block in routers if not mixtures[block]):
        raise InputError(f"Block {lacking[0]} has no router that a predictor could serve.")
    if not form.mlp_out_norm and (behind_mlps := [p for p in predictors if p.sync_point == "mlp"]):
        raise InputError(f"{behind_mlps[0]} has a predictor, and no norm behind it that would need one: no plan.")
    owes = False
    for i, layer in enumerate(layers):
        of_attention, of_mlp = Point(i, "attention"), Point(i, "mlp")
        attention, mlp = drops.at(of_attention), drops.at(of_mlp)
        dense = attention.strategy == mlp.strategy == KEEP and not owes
        for linear in form.linears(layer):
            _set_forward(linear, None if dense else ending_before(linear))
        if mixtures[i] is not None:
            end_before_sum(mixtures[i], not dense)
        planned = Planned(
            attention,
            mlp,
            predictors.get(of_attention),
            routers.get(i),
            predictors.get(of_mlp),
            owes=owes,
            last=i == len(layers) - 1,
        )
        _set_forward(layer, None if dense else form.planned(layer, form.parts(layer), planned))
        owes = mlp.strategy != KEEP


def count_layers(model: nn.Module) -> int:
    """Return the number of decoder layers of a loaded vLLM model; raises InputError for one that is not on the list."""
    return len(find(model)[1])


def _fitted_at(point: Point, drop: Drop, *, o_proj: Any) -> Predictor:
    """Return the predictor of a sync point: an MLP's reads this rank's partial sum itself, which is as wide as all."""
    read = o_proj.input_size_per_partition if point.sync_point == "attention" else o_proj.output_size
    return fitted(o_proj, drop, block=point.block, d_rank=read)


def fitted(o_proj: Any, drop: Drop, *, block: int, d_rank: int) -> Predictor:
    """Return this rank's predictor of `drop` where o_proj is and in its dtype; `d_rank`: values it reads.

    Raises InputError where there is none for this rank, or where its shapes are others.
    """
    assert drop.predictors is not None
    if o_proj.tp_rank not in drop.predictors:
        raise InputError(f"Block {block} has no predictor for rank {o_proj.tp_rank}.")
    own = {o_proj.tp_rank: drop.predictors[o_proj.tp_rank]}
    check_predictors(block, own, d_rank=d_rank, d=o_proj.output_size)
    return own[o_proj.tp_rank].like(_as_computed(o_proj))


def fitted_router(o_proj: Any, router: Predictor, *, block: int) -> Predictor:
    """Return the predictor of a block's router, as `fitted` does a rank's own. Raises InputError for other shapes."""
    check_router_predictor(block, router, d=o_proj.output_size)
    return router.like(_as_computed(o_proj))


def _as_computed(o_proj: Any) -> torch.Tensor:
    """Return an empty tensor where o_proj is and in the dtype that it computes in."""
    weight = next(o_proj.parameters())  # which may be packed, so that its dtype says nothing
    return torch.empty(0, device=weight.device, dtype=o_proj.params_dtype)


def _refuse_foreign_forward(module: nn.Module, block: int) -> None:
    """Raise InputError where `module` runs another forward than its class's or one of ours: it would be lost."""
    forward = vars(module).get("forward")
    if forward is not None and not hasattr(forward, "of_spd_calib"):
        raise InputError(
            f"Something has wrapped the forward of block {block}'s {type(module).__name__}, as weight offloading does, "
            "and a plan would take its place; start vLLM without it, or without the plan."
        )


def _set_forward(module: Any, forward: Any) -> None:
    """Make `module` run `forward`; with None, its class's own again."""
    vars(module).pop("forward", None)
    if forward is not None:
        forward.of_spd_calib = True
        module.forward = forward
