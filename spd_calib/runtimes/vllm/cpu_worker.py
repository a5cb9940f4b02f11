"""vLLM's CPU worker, with a plan."""

from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import planned

PlannedCPUWorker = planned(CPUWorker)
