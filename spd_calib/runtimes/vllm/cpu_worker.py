"""vLLM's CPU worker, with a plan."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import apply_plan


class PlannedCPUWorker(CPUWorker):
    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        apply_plan(self)
