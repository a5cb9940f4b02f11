"""The entry point under `sglang.srt.plugins`: where the environment names a plan, SGLang's start passes by it.

SGLang logs what goes wrong with a plugin or a hook, and goes on: it would serve the dense model. So nothing that could
fail is imported before it is known that there is a plan, and then whatever fails ends the process.
"""

import os
from typing import Any


def register() -> None:
    """Hook what SGLang does at its start and with its weights; without a plan nothing is done to it.

    SGLang calls this in each of its processes. Raises SystemExit, which SGLang does not catch, where the plan cannot be
    run in this release.
    """
    if not os.environ.get("SPD_PLAN"):
        return
    try:
        _register()
    except Exception as e:
        raise SystemExit(f"SPD_PLAN names a plan, and spd-calib cannot run it in this SGLang: {e}.") from e


def _register() -> None:
    from pkgutil import resolve_name

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in hooks().items():
        resolve_name(target)
        HookRegistry.register(target, hook, HookType.AROUND)


def hooks() -> dict[str, Any]:
    """Return what is called around what of SGLang's: hook(original, *arguments)."""
    from . import worker

    executor, scheduler = "sglang.srt.model_executor", "sglang.srt.managers.scheduler_components"
    updater = f"{executor}.model_runner_components.weight_updater.WeightUpdater"
    return {
        "sglang.srt.server_args.ServerArgs.check_server_args": _check_server_args,
        f"{executor}.model_runner.ModelRunner.load_model": worker.load_model,
        f"{updater}.update_weights_from_disk": worker.refuse_weights,
        f"{updater}.update_weights_from_ipc": worker.refuse_weights,
        f"{updater}.update_weights_from_tensor": worker.refuse_weights,
        f"{updater}.load_weights_from_distributed": worker.refuse_weights,
        f"{scheduler}.weight_updater.SchedulerWeightUpdaterManager.begin_weight_update": worker.refuse_update_session,
    }


def _check_server_args(check: Any, args: Any) -> None:
    """Check SGLang's arguments as it does, and then the plan against them."""
    from .configure import configured

    check(args)
    configured(args)
