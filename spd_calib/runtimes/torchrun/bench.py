"""How long a sync and a forward take on real ranks. Runs on every rank alike, under torchrun.

What is compared is measured in turns, round after round, so that a machine that grows slower does so for all.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from spd_calib.formats.common import Strategy
from spd_calib.formats.hardware import Collective, Step, Timing
from spd_calib.formats.plan import Plan
from spd_calib.parallel.compensation import Compensation
from spd_calib.parallel.model import TensorParallelLM

SIZES = tuple(2**k for k in range(10, 25, 2))  # bytes: 1 KiB to 16 MiB
AT_ONCE = 2**22  # bytes reduced between two looks at the clock, at most; see `time_collectives`
Blocks = Literal["dense", "plan", "every_block_dropped"]
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    rounds: int = 20
    batch: int = 1
    tokens: int = 128
    new_tokens: int = 16


@torch.no_grad()
def time_collectives(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int] = SIZES,
    rounds: int = 20,
    tick: Tick = lambda _: None,
) -> list[Collective]:
    """All-reduce, and all-gather with a sum of one's own, of messages of `sizes` bytes.

    Small ones are too quick for a clock: up to 16 are made in a row, and the time divided.
    """
    methods: dict[Literal["all_reduce", "all_gather_and_sum"], Callable[[Tensor], Any]] = {
        "all_reduce": dist.all_reduce,
        "all_gather_and_sum": _all_gather_and_sum,
    }
    messages = {size: torch.zeros(size // dtype.itemsize, dtype=dtype, device=device) for size in sizes}
    times: dict[tuple, list[float]] = {(method, size): [] for size in sizes for method in methods}
    for turn in range(rounds + 1):
        for method, size in _rotated(list(times), turn):
            in_a_row = max(1, min(16, AT_ONCE // size))
            with _Clock(device) as clock:
                for _ in range(in_a_row):
                    methods[method](messages[size])
            if turn:  # the first is to warm up
                times[method, size].append(clock.seconds / in_a_row)
        tick("all-reduce")
    ranks = dist.get_world_size()
    return [
        Collective(method=method, ranks=ranks, bytes=size, seconds=_timing(seconds))
        for (method, size), seconds in times.items()
    ]


@torch.no_grad()
def time_steps(
    lm: TensorParallelLM,
    plan: Plan,
    compensation: dict[int, dict[int, Compensation]],
    settings: Settings,
    tick: Tick = lambda _: None,
) -> list[Step]:
    """Prefill and decode of random tokens: dense, as planned, and with every attention sync point dropped.

    Leaves every sync point kept.
    """
    keep, drop = ((s,) * lm.num_blocks for s in (Strategy.KEEP_SYNC, Strategy.BLOCK_DROP))
    variants: dict[Blocks, tuple] = {
        "dense": (keep, keep, {}),
        "plan": (plan.strategies, plan.mlp_strategies, compensation),
        "every_block_dropped": (drop, keep, {}),
    }
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.tokens)
    ids = torch.randint(0, lm.head.vocab_size, shape, generator=generator).to(lm.device)
    times: dict[tuple, list[float]] = {(phase, name): [] for phase in ("prefill", "decode") for name in variants}
    for turn in range(settings.rounds + 1):
        for name in _rotated(list(variants), turn):
            attention, mlp, predictors = variants[name]
            lm.set_strategies(attention, mlp)
            lm.set_compensation(predictors)
            with _Clock(lm.device) as clock:
                out = lm.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            if turn:
                times["prefill", name].append(clock.seconds)
            for _ in range(settings.new_tokens):
                token = out.logits[:, -1:].argmax(-1)
                with _Clock(lm.device) as clock:
                    out = lm.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                if turn:
                    times["decode", name].append(clock.seconds)
        tick("prefill and decode")
    lm.keep_all()
    lm.set_compensation({})
    dropped = {
        name: sum(s != Strategy.KEEP_SYNC for s in (*attention, *mlp)) for name, (attention, mlp, _) in variants.items()
    }
    return [
        Step(
            phase=phase,
            blocks=name,
            dropped=dropped[name],
            batch=settings.batch,
            tokens=settings.tokens,
            seconds=_timing(seconds),
        )
        for (phase, name), seconds in times.items()
    ]


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _all_gather_and_sum(message: Tensor) -> Tensor:
    """The sum over all ranks, added up in their order: the same bits on each."""
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, message)
    return torch.stack(parts).sum(0)


class _Clock:
    """Seconds from when all ranks have come in until this one is done."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "_Clock":
        dist.barrier()
        self._wait()
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self.begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _rotated(items: list, turn: int) -> list:
    """The items in an order that puts each of them first in its turn."""
    start = turn % len(items)
    return items[start:] + items[:start]


def _timing(seconds: Sequence[float]) -> Timing:
    """Of the slowest rank in each measurement."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(seconds))
    slowest = torch.tensor(everyone, dtype=torch.float64).amax(0)
    low, median, high = slowest.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(median=median, p10=low, p90=high, repeats=len(seconds))
