"""Making a loaded vLLM model run what a plan drops, layer by layer, and taking it back."""

from typing import Any

import torch
from torch import nn

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point
from spd_calib.models.predictor import Predictor, check_predictors

from .forms import find
from .forwards import KEEP, Planned
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
    for i, layer in enumerate(layers):
        for module in (layer, *map(layer.get_submodule, (form.o, form.down))):
            _refuse_foreign_forward(module, i)
    predictors = {
        point.block: fitted(layers[point.block].get_submodule(form.o), drops.at(point), block=point.block)
        for point in drops
        if drops.at(point).predictors is not None
    }
    owes = False
    for i, layer in enumerate(layers):
        attention, mlp = drops.at(Point(i, "attention")), drops.at(Point(i, "mlp"))
        dense = attention.strategy == mlp.strategy == KEEP and not owes
        for linear in map(layer.get_submodule, (form.o, form.down)):
            _set_forward(linear, None if dense else ending_before(linear))
        planned = Planned(attention, mlp, predictors.get(i), owes=owes)
        _set_forward(layer, None if dense else form.planned(layer, form.parts(layer), planned))
        owes = mlp.strategy != KEEP


def count_layers(model: nn.Module) -> int:
    """Return the number of decoder layers of a loaded vLLM model; raises InputError for one that is not on the list."""
    return len(find(model)[1])


def fitted(o_proj: Any, drop: Drop, *, block: int) -> Predictor:
    """Return this rank's predictor of `drop` where o_proj is and in the dtype that o_proj computes in.

    Raises InputError where there is none for this rank, or where its shapes are not o_proj's.
    """
    assert drop.predictors is not None
    if o_proj.tp_rank not in drop.predictors:
        raise InputError(f"Block {block} has no predictor for rank {o_proj.tp_rank}.")
    own = {o_proj.tp_rank: drop.predictors[o_proj.tp_rank]}
    check_predictors(block, own, d_rank=o_proj.input_size_per_partition, d=o_proj.output_size)
    weight = next(o_proj.parameters())  # which may be packed, so that its dtype says nothing
    return own[o_proj.tp_rank].like(torch.empty(0, device=weight.device, dtype=o_proj.params_dtype))


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
