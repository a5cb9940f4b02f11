"""The entry point under `vllm.general_plugins`: every engine configuration passes by the plan, if there is one."""

import functools
from typing import Any


def register() -> None:
    """Have every engine configuration that vLLM makes from now on checked for a plan, and prepared for it.

    vLLM calls this in each of its processes, before it makes one. Without a plan nothing is done to it. This module
    imports nothing heavy: vLLM goes on without a plugin that cannot be imported, and would then serve the dense model.
    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if hasattr(create, "with_spd_plan"):
        return

    @functools.wraps(create)
    def create_engine_config(self, *args: Any, **kwargs: Any):
        from .configure import configure

        config = create(self, *args, **kwargs)
        configure(config)
        return config

    create_engine_config.with_spd_plan = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
