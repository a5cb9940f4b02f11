"""Making a loaded SGLang model run what a plan drops, layer by layer."""

from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point
from spd_calib.runtimes.engine_layers import check_sync_points, fitted_at, refuse_foreign_forward, set_forward
from spd_calib.runtimes.planned import KEEP, Planned

from .forms import find, linears
from .forward import ending_before, planned_forward

ENGINE = "SGLang"


def apply(model: Any, drops: Drops, *, rank: int) -> None:
    """Make a loaded SGLang model run `drops`, which hold the predictors of this `rank`; undoes what was applied before.

    Layers with nothing to drop keep SGLang's own forward. Raises InputError, before anything is changed, for a model
    that is not on the list (forms.py), for sync points it does not have, for predictors that do not fit it, and where
    somebody else has put a forward of their own around a layer.
    """
    layers = find(model)
    check_sync_points(drops, blocks=len(layers), engine=ENGINE)
    for i, layer in enumerate(layers):
        for module in (layer, *linears(layer)):
            refuse_foreign_forward(module, block=i, engine=ENGINE)
    if others := [p for p in drops if drops.at(p).router or (drops.at(p).predictors and p.sync_point == "mlp")]:
        raise InputError(f"{others[0]} has a predictor that no layer of this model reads: no plan.")
    predictors = {
        point: fitted_at(point, drops.at(point), o_proj=layers[point.block].self_attn.o_proj, rank=rank)
        for point in drops
        if drops.at(point).predictors is not None
    }
    owes = False
    for i, layer in enumerate(layers):
        of_attention, of_mlp = Point(i, "attention"), Point(i, "mlp")
        planned = Planned(drops.at(of_attention), drops.at(of_mlp), predictors.get(of_attention), owes=owes)
        dense = planned.attention.strategy == planned.mlp.strategy == KEEP and not owes
        for linear in linears(layer):
            set_forward(linear, None if dense else ending_before(linear))
        set_forward(layer, None if dense else planned_forward(layer, planned, rank=rank))
        owes = planned.mlp.strategy != KEEP
