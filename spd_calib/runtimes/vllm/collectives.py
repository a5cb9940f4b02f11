"""Timing all-reduces in a worker, by the very kernel that the engine uses for a message of that size."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IN_A_ROW = 16  # in one look at the clock, for which one is too quick


@torch.inference_mode()
def time_all_reduces(
    sizes: Sequence[int], *, rounds: int, dtype: torch.dtype, device: torch.device, graphs: bool
) -> list[list[float]]:
    """Return the seconds of an all-reduce of each of `sizes` bytes, round by round; all ranks call this at once.

    With `graphs` all-reduces are captured in a CUDA graph, where vLLM may take another kernel for them, and replayed.
    """
    from vllm.distributed import get_tp_group

    messages = [torch.zeros(size // dtype.itemsize, dtype=dtype, device=device) for size in sizes]
    calls = [_captured(message) if graphs else _in_a_row(message) for message in messages]
    found: list[list[float]] = [[] for _ in sizes]
    for turn in range(rounds + 1):
        for seconds, call in zip(found, calls, strict=True):
            dist.barrier(group=get_tp_group().cpu_group)
            begun = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first is to warm up
                seconds.append((time.perf_counter() - begun) / IN_A_ROW)
    return found


def _in_a_row(message: Tensor) -> Callable[[], Any]:
    from vllm.distributed import tensor_model_parallel_all_reduce

    def call() -> None:
        for _ in range(IN_A_ROW):
            tensor_model_parallel_all_reduce(message)

    return call


def _captured(message: Tensor) -> Callable[[], Any]:
    from vllm.distributed.parallel_state import graph_capture

    call, graph = _in_a_row(message), torch.cuda.CUDAGraph()
    with graph_capture(device=message.device) as captured:
        call()
        torch.cuda.synchronize(message.device)
        with torch.cuda.graph(graph, stream=captured.stream):
            call()
    return graph.replay
