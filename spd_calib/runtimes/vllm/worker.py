"""Applying a plan in a worker, once the model is loaded, and only where all ranks of its group apply the same one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops
from spd_calib.formats.files import sha256_of
from spd_calib.models.plan_files import load_plan
from spd_calib.runtimes.agreement import check_agreement
from spd_calib.runtimes.engine_layers import applied

from .configure import PLAN, RESOLVED
from .layers import apply, count_layers, share
from .rows import from_rows

NEEDS = "vLLM with spd-calib's plugin, the same plan, and --worker-cls where a node might lack either"


def planned(base: type) -> Any:
    """Return the worker class that is vLLM's `base` with a plan: applied once the model is loaded.

    From then on it refuses whatever would give the engine other weights than those that the plan was made for. It goes
    on serving after that.
    """

    class Planned(base):
        def load_model(self, **kwargs: Any) -> None:
            super().load_model(**kwargs)
            apply_plan(self)

        def sleep(self, level: int = 1) -> None:
            if level > 1:
                _refuse_other_weights(f"sleep(level={level}) throws the weights away")
            super().sleep(level)

        def discard(self, tags: tuple[str, ...]) -> None:
            if "weights" in tags:
                _refuse_other_weights("discard(['weights']) throws the weights away")
            super().discard(tags)

        def reset_weights(self) -> None:
            _refuse_other_weights("reset_weights sets the weights to zero")

        def reload_weights(self, *args: Any, **kwargs: Any) -> None:
            _refuse_other_weights("reload_weights brings in other weights")

        def start_weight_update(self) -> None:
            _refuse_other_weights("a weight update brings in other weights")

        def start_draft_weight_update(self) -> None:
            _refuse_other_weights("a weight update brings in other weights")

    Planned.__qualname__ = Planned.__name__ = f"Planned{base.__name__}"
    return Planned


def _refuse_other_weights(what: str) -> None:
    raise InputError(f"{what}, and the plan was made for those loaded at the start; start the engine anew.")


def apply_plan(worker: Any) -> None:
    """Apply the drops that `configure` put into the worker's configuration.

    Raises InputError, which ends the engine's start, where this rank or another one of its tensor-parallel group could
    not, where another applied another plan, and where one has not joined in time.
    """
    digest, error = None, None
    try:
        digest = _apply(worker)
    except InputError as e:
        error = str(e)
    from vllm.distributed import get_tp_group

    check_agreement(get_tp_group().cpu_group, applied=digest, error=error, needs=NEEDS)
    share(worker.model_runner.get_model())


def _apply(worker: Any) -> str:
    """Apply the plan on this rank alone; returns the digest of all that it says."""
    from vllm.logger import init_logger

    config = worker.vllm_config.additional_config
    resolved = config.get(RESOLVED) if isinstance(config, dict) else None
    if resolved is None:
        raise InputError(
            "This worker runs plans, but its configuration holds none that was checked: start vLLM on this node with "
            "spd-calib's plugin (VLLM_PLUGINS must not leave it out) and with the plan."
        )
    model, path, blocks = worker.model_runner.get_model(), Path(config[PLAN]), resolved["blocks"]
    if (found := count_layers(model)) != blocks:
        raise InputError(f"The plan has {blocks} blocks, but the model vLLM loaded has {found}.")
    if not path.is_file():
        raise InputError(f"There is no file {path} on this node; copy the plan, and what lies beside it, to every one.")
    if sha256_of(path) != resolved["sha256"]:
        raise InputError(f"{path} is not the plan that this engine was configured with; start it again.")
    drops = drops_of_this_rank(resolved["drops"], path if resolved["compensation"] else None)
    apply(model, drops)
    init_logger("vllm.spd_calib").info(applied(drops, digest=resolved["sha256"], blocks=blocks))
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def drops_of_this_rank(rows: Iterable[dict[str, Any]], plan: Path | None = None) -> Drops:
    """Return the drops in `rows` with the predictors of this worker's rank that `plan` has for them, if it is given.

    Raises InputError where the plan or the file beside it cannot be used.
    """
    drops = from_rows(rows)
    if plan is None:
        return drops
    from vllm.distributed import get_tensor_model_parallel_rank

    _, of_plan = load_plan(plan, ranks=[get_tensor_model_parallel_rank()])
    return drops | of_plan.only(p for p in of_plan if of_plan.at(p).predictors or of_plan.at(p).router)
