"""vLLM's GPU worker, with a plan."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from .worker import apply_plan


class PlannedGPUWorker(Worker):
    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        apply_plan(self)
