"""Making a loaded vLLM model run what a plan drops, layer by layer, and taking it back."""

from typing import Any

from torch import nn

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point
from spd_calib.runtimes.engine_layers import (
    check_sync_points,
    fitted_at,
    fitted_router,
    refuse_foreign_forward,
    set_forward,
)
from spd_calib.runtimes.planned import KEEP, Planned

from .find import find
from .mixtures import end_before_sum, share_biases
from .projections import ending_before


def apply(model: nn.Module, drops: Drops) -> None:
    """Make a loaded vLLM model run `drops`, which hold this rank's predictors; undoes what was applied before.

    Layers with nothing to drop keep vLLM's own forward. Raises InputError, before anything is changed, for a model
    that is not on the list (forms.py), for sync points it does not have, for predictors that do not fit it, and where
    somebody else has put a forward of their own around a layer.
    """
    form, layers = find(model)
    check_sync_points(drops, blocks=len(layers), engine="vLLM")
    mixtures = [form.mixture_of(layer) for layer in layers]
    if drops.streams_differ and any(mixtures):
        raise InputError("Ranks whose streams differ for good (plain_drop) would choose different experts: no plan.")
    for i, layer in enumerate(layers):
        for module in form.called(layer):
            refuse_foreign_forward(module, block=i, engine="vLLM")
    o_projs: list[Any] = [form.o_proj(layer) for layer in layers]
    predictors = {
        point: fitted_at(point, drops.at(point), o_proj=o_projs[point.block], rank=o_projs[point.block].tp_rank)
        for point in drops
        if drops.at(point).predictors is not None
    }
    routers = {
        point.block: fitted_router(o_projs[point.block], router, block=point.block)
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
            set_forward(linear, None if dense else ending_before(linear))
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
        set_forward(layer, None if dense else form.planned(layer, form.parts(layer), planned))
        owes = mlp.strategy != KEEP


def share(model: nn.Module) -> None:
    """Tell every rank what the layers of a model to which drops were applied must know of the other ranks' weights.

    To be called by all ranks, once all have applied the same drops.
    """
    form, layers = find(model)
    share_biases(mixture for layer in layers if (mixture := form.mixture_of(layer)) is not None)


def count_layers(model: nn.Module) -> int:
    """Return the number of decoder layers of a loaded vLLM model; raises InputError for one that is not on the list."""
    return len(find(model)[1])
