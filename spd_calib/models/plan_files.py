"""A plan and the predictors in the file beside it, from disk to the drops that a model runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point
from spd_calib.formats.files import read, sha256_of
from spd_calib.formats.phases import ByPhase
from spd_calib.formats.plan import Compensation, Plan

from .predictor import Predictor, predictor_shapes

Owner = int | Literal["router"]  # of a predictor: a rank, or the router, whose predictor is the same on all ranks
OfPoints = dict[Point, dict[Owner, Predictor]]  # predictors by sync point and owner


def load_plan(path: Path, *, ranks: Iterable[int] | None = None) -> tuple[Plan, Drops]:
    """Read a plan, and the drops that a model runs: its strategies and the predictors in the file beside it.

    With `ranks`, the predictors of those alone; the tensors of the others are not read. Raises InputError where the
    plan cannot be used, or where the file beside it is missing, lies elsewhere, is not the one the plan was written
    with, or holds other tensors than the plan says.
    """
    plan = read(Plan, path)
    return plan, load_drops(plan, path, ranks=ranks)


def load_drops(plan: Plan, path: Path | None, *, ranks: Iterable[int] | None = None) -> Drops:
    """Return the drops of a plan that was read from `path`, with its predictors; see load_plan.

    A plan that comes from no file (`path` None) can have none: raises InputError where it has, and for a plan that has
    a choice for each phase.
    """
    check_one_choice(plan, path)
    predictors, drops = _load_predictors(plan, plan_path=path, ranks=ranks), plan.drops
    return drops | Drops({point: _drop(drops.at(point), own) for point, own in predictors.items()})


def check_one_choice(plan: Plan, path: Path | None) -> None:
    """Raise InputError for a plan, read from `path` if from any, that has a choice for each phase."""
    if plan.in_two_phases:
        raise InputError(
            f"{path or 'This plan'} has a choice for prefill and another for decoding, which `generate` takes, and "
            "`check` and `bench` on torchrun, nothing else; plan anew without `new_tokens` for one choice."
        )


def load_plan_by_phase(path: Path, *, ranks: Iterable[int] | None = None) -> tuple[Plan, ByPhase]:
    """Read a plan, and the drops that a model runs in each phase, as load_plan does those of a plan with one choice."""
    plan = read(Plan, path)
    return plan, load_by_phase(plan, path, ranks=ranks)


def load_by_phase(plan: Plan, path: Path | None, *, ranks: Iterable[int] | None = None) -> ByPhase:
    """Return the drops of a plan that was read from `path` in each phase; see load_drops."""
    return plan.by_phase if plan.in_two_phases else ByPhase.of(load_drops(plan, path, ranks=ranks))


def _drop(drop: Drop, predictors: Mapping[Owner, Predictor]) -> Drop:
    of_ranks = {owner: predictor for owner, predictor in predictors.items() if owner != "router"}
    return replace(drop, predictors=of_ranks or None, router=predictors.get("router"))


def predictor_tensors(drops: Drops) -> dict[str, Tensor]:
    """Return all predictors of `drops` as they are written beside a plan, float32 on the CPU; empty without any."""
    return {
        _tensor_name(point, owner=owner, part=part): tensor.detach().to("cpu", torch.float32).contiguous()
        for point in drops
        for owner, predictor in _owned(drops.at(point)).items()
        for part, tensor in predictor.named_parameters()
    }


def _owned(drop: Drop) -> dict[Owner, Predictor]:
    """Return the predictors of a drop by owner."""
    owned: dict[Owner, Predictor] = dict((drop.predictors or {}).items())
    return owned if drop.router is None else {**owned, "router": drop.router}


def _tensor_name(point: Point, *, owner: Owner, part: str) -> str:
    """Return the name of a tensor in the file beside the plan; part: bias, scale, a, b or w."""
    whose = "router" if owner == "router" else f"ranks.{owner}"
    return f"blocks.{point.block}.{'mlp.' if point.sync_point == 'mlp' else ''}{whose}.{part}"


def _load_predictors(plan: Plan, *, plan_path: Path | None, ranks: Iterable[int] | None) -> OfPoints:
    if plan.compensation is None:
        return {}
    if plan_path is None:
        raise InputError(
            "The predictors of this plan lie in a file beside it; give the path of the plan's file "
            "(`plan_with_details(...).write` writes both)."
        )
    path = plan_path.parent / plan.compensation.file
    if not path.is_file():
        raise InputError(f"{plan_path} needs {path.name} beside it, and it is not there; copy both files together.")
    if path.resolve().parent not in (plan_path.parent.resolve(), plan_path.resolve().parent):
        # the hub's cache links both files to one folder; a link to anywhere else is not followed
        raise InputError(f"{path} is a link that leaves the folder of {plan_path}; copy the file itself there.")
    try:
        if sha256_of(path) != plan.compensation.sha256:
            raise InputError(f"{path} is not the file {plan_path} was written with; run `spd-calib recover` again.")
        with safe_open(path, framework="pt") as file:
            wanted = set(ranks) if ranks is not None else set(range(plan.tensor_parallel.size))
            return _read_predictors(plan, plan_path, path=path, file=file, ranks=wanted)
    except (SafetensorError, OSError):
        raise InputError(f"{path} is not a whole safetensors file; run `spd-calib recover` again.") from None


def _read_predictors(plan: Plan, plan_path: Path, *, path: Path, file: Any, ranks: set[int]) -> OfPoints:
    """Return what the open safetensors file holds for `ranks`; every name in it must be one of the plan's."""
    names = set(file.keys())
    found: OfPoints = {}
    for point, owners, form in predictor_forms(plan):
        for owner in owners:
            shapes = predictor_shapes(form.kind, 1, d_rank=1, d=1, scaled=form.scaled)
            named = {p: _tensor_name(point, owner=owner, part=p) for p in shapes}
            if owner != "router" and owner not in ranks:
                names -= set(named.values())
                continue
            parts = {p: file.get_tensor(n) if n in names else None for p, n in named.items()}
            names -= set(named.values())
            d, d_rank = (len(b) if (b := parts["bias"]) is not None and b.dim() == 1 else 0), 0
            for inner in (parts.get("a"), parts.get("w")):
                d_rank = inner.shape[0] if inner is not None else d_rank
            expected = predictor_shapes(form.kind, form.rank, d_rank=d_rank, d=d, scaled=form.scaled)
            for part, tensor in parts.items():
                if (
                    tensor is None
                    or tensor.dtype != torch.float32
                    or tensor.shape != expected[part]
                    or not tensor.isfinite().all()
                ):
                    raise InputError(f"{path}: {named[part]} is missing or not what it should be.")
            found.setdefault(point, {})[owner] = Predictor(**parts)  # type: ignore[arg-type]
    if names:
        raise InputError(f"{path} holds {min(names)}, which {plan_path} does not name.")
    return found


def predictor_forms(plan: Plan) -> Iterator[tuple[Point, Sequence[Owner], Compensation]]:
    """Yield the sync points whose drops have predictors, whose these are, and their form."""
    ranks = range(plan.tensor_parallel.size)
    for block in plan.blocks:
        attention = Point(block.index, "attention")
        if block.compensation is not None:
            yield attention, ranks, block.compensation
        if block.router is not None and block.router.kind != "zero":
            yield attention, ["router"], Compensation(kind=block.router.kind, rank=block.router.rank)
        if block.mlp_compensation is not None:
            yield Point(block.index, "mlp"), ranks, block.mlp_compensation


def form_of(drops: Drops, point: Point) -> Compensation | None:
    """Return the form of the predictors at a sync point, which is the same on all ranks; None where it has none."""
    first = next(iter((drops.at(point).predictors or {}).values()), None)
    return None if first is None else Compensation(kind=first.kind, rank=first.rank, scaled=first.scale is not None)
