"""Timing a sync and a forward on real ranks. Runs on every rank alike, under torchrun.

What is compared is measured in turns, round after round, so that a machine that grows slower does so for all.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.common import Provenance
from spd_calib.formats.drops import BITS, Drops, Strategy
from spd_calib.formats.files import sha256_of
from spd_calib.formats.hardware import Collective, Hardware, TimedStep, Timing
from spd_calib.formats.phases import NOTHING_DROPPED_IN_BOTH, ByPhase
from spd_calib.models.plan_files import load_plan_by_phase
from spd_calib.parallel.comm import GATHERED_AT_MOST, DistributedComm
from spd_calib.parallel.distributed import backend, local_size
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.ranks import rank, world_size
from spd_calib.runtimes.bench import SIZES, BenchSettings, Blocks, device_name, rotated, timing

AT_ONCE = 2**22  # bytes reduced between two looks at the clock, at most; see `time_collectives`
Tick = Callable[[str], None]
Method = Literal["all_reduce", "all_gather_and_sum", "quantised_sync"]


class BenchJob(BaseModel, frozen=True):
    """The job of the ranks; `model` is a folder or a hub id, `provenance` that of the file that is written."""

    plan: Path
    model: str
    settings: BenchSettings
    device: str
    dtype: str
    provenance: Provenance


def run(job: BenchJob, *, expect: Callable[[int], None], tick: Tick) -> Hardware:
    """Time everything on this rank; all ranks call this at once and return the same.

    `expect` is told how often `tick` will be called. Raises InputError as load_plan and open_session do, and for
    sequences that are longer than the model can read.
    """
    plan, drops = load_plan_by_phase(job.plan, ranks=[rank()])
    session = open_session(job.model, plan.tensor_parallel.size, expected=plan.model)
    if job.settings.longest > session.max_length:
        raise InputError(
            f"`tokens` {max(job.settings.tokens)} and `new_tokens` {job.settings.new_tokens} are beyond the model's "
            f"{session.max_length}; lower them."
        )
    lm = session.load(job.device, job.dtype, drops=drops)
    expect((1 + len(job.settings.steps)) * (job.settings.rounds + 1))
    collectives = time_collectives(lm.device, lm.model.dtype, rounds=job.settings.rounds, tick=tick)
    steps = time_steps(lm, drops, settings=job.settings, tick=tick)
    return Hardware(
        model=plan.model,
        plan_sha256=sha256_of(job.plan),
        tensor_parallel=plan.tensor_parallel,
        device=device_name(lm.device),
        backend=backend(job.device),
        nodes=world_size() // local_size(),
        gathered_at_most=GATHERED_AT_MOST if lm.device.type == "cpu" else 0,
        collectives=collectives,
        steps=steps,
        provenance=job.provenance,
    )


@torch.no_grad()
def time_collectives(
    device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int] = SIZES, rounds: int, tick: Tick
) -> list[Collective]:
    """Time all-reduces, all-gathers with a sum of one's own, and quantised syncs (of every other size).

    Messages are of `sizes` bytes. Small ones are too quick for a clock: up to 16 are made in a row, and the time
    divided. Calls `tick` after a round.
    """
    comm = DistributedComm()
    methods: dict[tuple[Method, Literal[8, 6, 4] | None], Callable[[Tensor], Any]] = {
        ("all_reduce", None): dist.all_reduce,
        ("all_gather_and_sum", None): _all_gather_and_sum,
    }
    if (device.type, dist.get_backend()) != ("cuda", "gloo"):  # which has no all-to-all between GPUs
        methods |= {("quantised_sync", b): partial(_quantised_sync, comm=comm, bits=b) for b in BITS}  # type: ignore[misc]
    messages = {size: torch.zeros(size // dtype.itemsize, dtype=dtype, device=device) for size in sizes}
    times: dict[tuple, list[float]] = {
        (how, size): [] for size in sizes for how in methods if how[1] is None or size in sizes[::2]
    }
    for turn in range(rounds + 1):
        for how, size in rotated(list(times), turn):
            in_a_row = max(1, min(16, AT_ONCE // size))
            with _Clock(device) as clock:
                for _ in range(in_a_row):
                    methods[how](messages[size])
            if turn:  # the first is to warm up
                times[how, size].append(clock.seconds / in_a_row)
        tick("all-reduce")
    ranks = dist.get_world_size()
    return [
        Collective(method=method, bits=bits, ranks=ranks, bytes=size, seconds=_timing(seconds))
        for ((method, bits), size), seconds in times.items()
    ]


@torch.no_grad()
def time_steps(lm: TensorParallelLM, planned: ByPhase, *, settings: BenchSettings, tick: Tick) -> list[TimedStep]:
    """Time prefill and decode of random tokens: dense, as planned, and with every attention sync point dropped."""
    variants: dict[Blocks, ByPhase] = {
        "dense": NOTHING_DROPPED_IN_BOTH,
        "plan": planned.map(lm.fitted),
        "every_block_dropped": ByPhase.of(Drops.of_blocks([Strategy.BLOCK_DROP] * lm.num_blocks)),
    }
    generator, times = torch.Generator().manual_seed(0), defaultdict[tuple, list[float]](list)
    for batch, tokens in settings.steps:
        ids = torch.randint(0, lm.head.vocab_size, (batch, tokens), generator=generator).to(lm.device)
        for turn in range(settings.rounds + 1):
            for name in rotated(list(variants), turn):
                with lm.running(variants[name]):
                    prefill, decode = _time_forwards(lm, ids, new_tokens=settings.new_tokens)
                if turn:
                    times["prefill", name, batch, tokens].append(prefill)
                    times["decode", name, batch, tokens].extend(decode)
            tick("prefill and decode")
    return [
        TimedStep(
            phase=phase,
            blocks=name,
            dropped=len(variants[name].at(phase)),
            quantised=variants[name].at(phase).counted_bits,
            batch=batch,
            tokens=tokens,
            seconds=_timing(seconds),
        )
        for (phase, name, batch, tokens), seconds in times.items()
    ]


def _time_forwards(lm: TensorParallelLM, ids: Tensor, *, new_tokens: int) -> tuple[float, list[float]]:
    """Return the seconds of a prefill of `ids` [B, T], and of each token decoded behind it."""
    with _Clock(lm.device) as clock:
        out = lm.model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill, decode = clock.seconds, []
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        with _Clock(lm.device) as clock:
            out = lm.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        decode.append(clock.seconds)
    return prefill, decode


def _all_gather_and_sum(message: Tensor) -> Tensor:
    """Return the sum over all ranks, added up in their order: the same bits on each."""
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, message)
    return torch.stack(parts).sum(0)


def _quantised_sync(message: Tensor, *, comm: DistributedComm, bits: int) -> Tensor:
    return comm.all_reduce([message], bits=bits)


class _Clock:
    """Measures the seconds from when all ranks have come in until this one is done."""

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


def _timing(seconds: Sequence[float]) -> Timing:
    """Return the spread of a measurement over its repeats; in each the slowest rank counts."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(seconds))
    return timing(everyone)
