"""Applying a plan on each rank, once SGLang has loaded its model, and only where all ranks apply the same one."""

import logging
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.files import sha256_of
from spd_calib.models.plan_files import load_plan
from spd_calib.runtimes.agreement import check_agreement
from spd_calib.runtimes.engine_layers import applied

from .configure import check, plan_path
from .forms import check_widths
from .layers import apply

NEEDS = "SGLang with spd-calib's plugin (SGLANG_PLUGINS must not leave it out) and the same plan in SPD_PLAN"
OTHER_WEIGHTS = "The plan was made for the weights loaded at the start; start SGLang anew to serve others."


def load_model(load: Any, runner: Any) -> None:
    """Load the model as SGLang's ModelRunner does, then apply the plan.

    Raises InputError, which ends the start, where this rank or another one of its tensor-parallel group could not,
    where another applied another plan, and where one has not joined in time.
    """
    path = plan_path()
    load(runner)
    if path is None:
        return
    from sglang.srt.runtime_context import get_parallel

    digest, error, parallel = None, None, get_parallel()
    try:
        digest = _apply(runner, path, rank=parallel.tp_rank)
    except InputError as e:
        error = str(e)
    check_agreement(parallel.tp_group.cpu_group, applied=digest, error=error, needs=NEEDS)


def _apply(runner: Any, path: Path, *, rank: int) -> str:
    """Apply the plan on this rank alone; returns its digest."""
    plan, drops = load_plan(path, ranks=[rank])
    config = check(plan, path, args=runner.server_args)
    check_widths(runner.model, config, tp=plan.tensor_parallel.size)
    apply(runner.model, drops, rank=rank)
    digest = sha256_of(path)
    logging.getLogger(__name__).info(applied(drops, digest=digest, blocks=plan.model.num_blocks))
    return digest


def refuse_weights(_update: Any, *_: Any, **__: Any) -> tuple[bool, str]:
    """Answer in place of an update of the weights: refused, and why. SGLang goes on serving those it has."""
    return False, OTHER_WEIGHTS


def refuse_update_session(_begin: Any, *_: Any, **__: Any) -> Any:
    """Answer in place of what opens a session of updates, which every other way of updating weights needs."""
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    return BeginWeightUpdateReqOutput(success=False, message=OTHER_WEIGHTS)
