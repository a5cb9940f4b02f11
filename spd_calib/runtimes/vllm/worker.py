"""What a worker does with its plan once the model is loaded."""

from typing import Any

from spd_calib.errors import InputError

from .configure import RESOLVED
from .layers import apply


def apply_plan(worker: Any) -> None:
    """Apply the strategies that `configure` put into the worker's configuration; an error ends the engine's start."""
    from vllm.logger import init_logger

    strategies = worker.vllm_config.additional_config.get(RESOLVED)
    if strategies is None:
        raise InputError("This worker runs plans, but its configuration holds none that was checked.")
    apply(worker.model_runner.get_model(), strategies["attention"], strategies["mlp"])
    dropped = sum(s != "keep_sync" for s in (*strategies["attention"], *strategies["mlp"]))
    init_logger("vllm.spd_calib").info(
        "spd-calib: plan %s, %d of %d sync points dropped",
        strategies["sha256"][:12],
        dropped,
        2 * len(strategies["attention"]),
    )
