"""Time products in bfloat16 against float32, and return the ratio: CPUs without instructions for it are far slower."""

import time

import torch

SHAPE = (512, 1024)


def bfloat16_slowdown(device: str) -> float:
    """Return how many times as long a product of bfloat16 matrices takes as one of float32 ones, the best of a few."""
    narrow, wide = (_seconds(torch.ones(SHAPE, device=device, dtype=d)) for d in (torch.bfloat16, torch.float32))
    return narrow / wide


def _seconds(x: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        x @ x.T
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - began)
    return best
