"""Saying what a bench is of, and how its times are told, whatever runtime is timed."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel

from spd_calib.formats.hardware import Timing

SIZES = tuple(2**k for k in range(10, 25, 2))  # bytes of an all-reduce: 1 KiB to 16 MiB
Blocks = Literal["dense", "plan", "every_block_dropped"]
T = TypeVar("T")


class BenchSettings(BaseModel, frozen=True):
    """The size of a bench: `rounds` turns; each of `batch_size` prompts of each of `tokens` tokens, `new_tokens`
    decoded behind them."""

    rounds: int = 20
    batch_size: tuple[int, ...] = (1,)
    tokens: tuple[int, ...] = (128,)
    new_tokens: int = 16

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Return every (batch size, tokens of a prompt) that is timed."""
        return [(batch, tokens) for batch in self.batch_size for tokens in self.tokens]

    @property
    def longest(self) -> int:
        """Return the tokens that the longest sequence comes to."""
        return max(self.tokens) + self.new_tokens


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """Return the items in an order that puts each of them first in its turn."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def timing(by_rank: Sequence[Sequence[float]]) -> Timing:
    """Return the spread of seconds [rank][repeat] over the repeats; in each the slowest rank counts."""
    slowest = torch.tensor(by_rank, dtype=torch.float64).amax(0)
    low, median, high = slowest.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(median=median, p10=low, p90=high, repeats=len(slowest))


def device_name(device: torch.device) -> str:
    """Return the GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
