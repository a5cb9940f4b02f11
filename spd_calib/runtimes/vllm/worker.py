"""What a worker does with its plan once the model is loaded."""

from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.files import read, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.parallel.compensation import Compensation, load_compensation

from .configure import PLAN, RESOLVED
from .layers import apply


def apply_plan(worker: Any) -> None:
    """Apply the strategies that `configure` put into the worker's configuration; an error ends the engine's start."""
    from vllm.logger import init_logger

    config = worker.vllm_config.additional_config
    strategies = config.get(RESOLVED)
    if strategies is None:
        raise InputError("This worker runs plans, but its configuration holds none that was checked.")
    path = Path(config[PLAN])
    predictors = of_this_rank(path, strategies["sha256"]) if strategies["compensation"] else {}
    apply(worker.model_runner.get_model(), strategies["attention"], strategies["mlp"], predictors)
    dropped = sum(s != "keep_sync" for s in (*strategies["attention"], *strategies["mlp"]))
    init_logger("vllm.spd_calib").info(
        "spd-calib: plan %s, %d of %d sync points dropped, %d compensated",
        strategies["sha256"][:12],
        dropped,
        2 * len(strategies["attention"]),
        len(predictors),
    )


def of_this_rank(path: Path, sha256: str | None = None) -> dict[int, Compensation]:
    """The predictors of this worker's rank by block, from the file beside the plan.

    Raises InputError where the plan is not the one of that hash any more, or the file not the plan's.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    if sha256 is not None and sha256_of(path) != sha256:
        raise InputError(f"{path} was changed while the engine started; start it again.")
    rank = get_tensor_model_parallel_rank()
    found = load_compensation(read(Plan, path), path, ranks=[rank])
    return {block: of_block[rank] for block, of_block in found.items()}
