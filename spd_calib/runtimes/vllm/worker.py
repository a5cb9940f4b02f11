"""Applying a plan in a worker, once the model is loaded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.drops import SUBLAYERS, Drops
from spd_calib.formats.files import sha256_of
from spd_calib.models.plan_files import load_plan

from .configure import PLAN, RESOLVED
from .layers import apply, count_layers
from .rows import from_rows


def apply_plan(worker: Any) -> None:
    """Apply the drops that `configure` put into the worker's configuration; an error ends the engine's start."""
    from vllm.logger import init_logger

    config = worker.vllm_config.additional_config
    resolved = config.get(RESOLVED)
    if resolved is None:
        raise InputError("This worker runs plans, but its configuration holds none that was checked.")
    model, path, planned = worker.model_runner.get_model(), Path(config[PLAN]), resolved["blocks"]
    if (found := count_layers(model)) != planned:
        raise InputError(f"The plan has {planned} blocks, but the model vLLM loaded has {found}.")
    if sha256_of(path) != resolved["sha256"]:
        raise InputError(f"{path} was changed while the engine started; start it again.")
    drops = drops_of_this_rank(resolved["drops"], path if resolved["compensation"] else None)
    apply(model, drops)
    init_logger("vllm.spd_calib").info(
        "spd-calib: plan %s, %d of %d sync points dropped, %d compensated",
        resolved["sha256"][:12],
        len(drops),
        len(SUBLAYERS) * planned,
        sum(drops.at(p).predictors is not None for p in drops),
    )


def drops_of_this_rank(rows: Iterable[dict[str, Any]], plan: Path | None = None) -> Drops:
    """Return the drops in `rows` with the predictors of this worker's rank that `plan` has for them, if it is given.

    Raises InputError where the plan or the file beside it cannot be used.
    """
    drops = from_rows(rows)
    if plan is None:
        return drops
    from vllm.distributed import get_tensor_model_parallel_rank

    _, planned = load_plan(plan, ranks=[get_tensor_model_parallel_rank()])
    return drops | planned.only(p for p in planned if planned.at(p).predictors is not None)
