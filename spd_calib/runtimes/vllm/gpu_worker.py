"""vLLM's GPU worker, with a plan."""

from vllm.v1.worker.gpu_worker import Worker

from .worker import planned

PlannedGPUWorker = planned(Worker)
