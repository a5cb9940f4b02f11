"""Timing vLLM as it is served: the dense model, the plan, and every attention sync point dropped.

A compiled engine cannot be given another plan, and several of them may not fit into memory side by side. So engines
are started one after another, then once more in the opposite order: a machine that grows slower does so for all.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from spd_calib.errors import InputError
from spd_calib.formats.common import Provenance
from spd_calib.formats.drops import Drops, Strategy
from spd_calib.formats.files import dumps, sha256_of, write_text
from spd_calib.formats.hardware import Collective, Hardware, TimedStep
from spd_calib.formats.plan import Plan
from spd_calib.parallel.session import Session
from spd_calib.runtimes.bench import SIZES, BenchSettings, Blocks, device_name, timing
from spd_calib.runtimes.checks import folder_of

from .engine import Engine, start_served

TURNS = 2  # in which each engine is started once


def bench_vllm(
    session: Session,
    path: Path,
    plan: Plan,
    *,
    settings: BenchSettings,
    arguments: Sequence[str],
    provenance: Provenance,
    expect: Callable[[int], None],
    tick: Callable[[str], None],
) -> Hardware:
    """Time engines that `vllm serve` with these `arguments` would start; `plan` is what the file at `path` holds.

    A step's time is what a client waits for: scheduler and sampler are in it. Raises InputError where vLLM, its
    arguments or the plan cannot be used, or the engine does not run so many sequences at once.
    """
    every = Drops.of_blocks([Strategy.BLOCK_DROP] * len(plan.blocks))
    dropped: dict[Blocks, int] = {"dense": 0, "plan": len(plan.drops), "every_block_dropped": len(every)}
    times: dict[tuple, list[float]] = defaultdict(list)
    expect(TURNS * len(dropped))
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        plans: dict[Blocks, Path | None] = {
            "dense": None,
            "plan": path,
            "every_block_dropped": _every_block_dropped(plan, Path(folder)),
        }
        for turn in range(TURNS):
            for name in list(plans)[:: -1 if turn % 2 else 1]:
                with start_served(
                    folder_of(session),
                    tp=session.tp,
                    plan=plans[name],
                    arguments=arguments,
                    longest=settings.longest + 1 + max(settings.batch_size),
                ) as engine:
                    about = about or _about(engine, settings)
                    for (phase, batch, tokens), seconds in _time_steps(engine, settings).items():
                        times[phase, name, batch, tokens].extend(seconds)
                tick(name.replace("_", " "))
    steps = [
        TimedStep(
            phase=phase,
            blocks=name,
            dropped=dropped[name],
            batch=batch,
            tokens=tokens,
            seconds=timing([seconds]),
        )
        for (phase, name, batch, tokens), seconds in times.items()
    ]
    ran = provenance.model_copy(update={"dtype": about.pop("dtype"), "device": about.pop("device_type")})
    return Hardware(
        model=plan.model,
        plan_sha256=sha256_of(path),
        tensor_parallel=plan.tensor_parallel,
        runtime="vllm",
        steps=steps,
        provenance=ran,
        **about,
    )


def _every_block_dropped(plan: Plan, folder: Path) -> Path:
    """Return a plan of the same model, written into `folder`, that drops every attention's sync point and no other."""
    blocks = [
        block.model_copy(
            update={
                "strategy": Strategy.BLOCK_DROP,
                "mlp_strategy": Strategy.KEEP_SYNC,
                "sync_bits": None,
                "mlp_sync_bits": None,
                "replicated": None,
                "compensation": None,
                "mlp_compensation": None,
                "router": None,
            }
        )
        for block in plan.blocks
    ]
    path = folder / "every_block_dropped.json"
    write_text(path, dumps(plan.model_copy(update={"blocks": blocks, "requires": [], "compensation": None})))
    return path


def _about(engine: Engine, settings: BenchSettings) -> dict[str, Any]:
    """Return what a Hardware says of the engine and its machine, all-reduces timed; refuses too large batches."""
    config = engine.llm.llm_engine.vllm_config
    if max(settings.batch_size) > (at_once := config.scheduler_config.max_num_seqs):
        raise InputError(
            f"vLLM runs {at_once} sequences at once here, and a batch of {max(settings.batch_size)} is to be timed; "
            "give it --max-num-seqs, or time smaller ones."
        )
    on_cpu = config.device_config.device_type == "cpu"
    compiled = not config.model_config.enforce_eager
    graphs = compiled and not on_cpu and config.compilation_config.cudagraph_mode.name != "NONE"
    by_rank = engine.call("spd_time_all_reduces", list(SIZES), settings.rounds, graphs)
    by_size = [list(of_size) for of_size in zip(*by_rank, strict=True)]  # size -> rank -> repeats
    return {
        "dtype": engine.dtype,
        "device_type": config.device_config.device_type,
        "device": device_name(torch.device("cpu")) if on_cpu else _gpu_name(),
        "backend": "gloo" if on_cpu else "nccl",
        "execution": "cuda_graphs" if graphs else "compiled" if compiled else "eager",
        "nodes": config.parallel_config.nnodes,
        "collectives": [
            Collective(method="all_reduce", ranks=len(by_rank), bytes=size, seconds=timing(seconds))
            for size, seconds in zip(SIZES, by_size, strict=True)
        ],
    }


def _gpu_name() -> str:
    """Return the name of the GPU, without starting CUDA in this process."""
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def _time_steps(engine: Engine, settings: BenchSettings) -> dict[tuple, list[float]]:
    """Return the seconds of prefills and of decoded tokens, by (phase, batch, tokens)."""
    found: dict[tuple, list[float]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    vocabulary = engine.llm.llm_engine.vllm_config.model_config.get_vocab_size()
    for turn in range(settings.rounds + 1):
        for batch, tokens in settings.steps:
            ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator).tolist()  # in no prefix cache
            prefill, decode = _time_batch(engine, ids, new_tokens=settings.new_tokens)
            if turn:  # the first is to warm up
                found["prefill", batch, tokens].append(prefill)
                found["decode", batch, tokens].extend(decode)
    return found


def _time_batch(engine: Engine, ids: list[list[int]], *, new_tokens: int) -> tuple[float, list[float]]:
    """Return the seconds until every sequence has its first token, and of each step that then gives all one more."""
    from vllm import SamplingParams

    served = engine.llm.llm_engine
    enough = new_tokens + 1 + len(ids)  # a sequence that is read first is ahead of the last by less than their number
    params = SamplingParams(temperature=0, max_tokens=enough, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    for i, prompt in enumerate(ids):
        served.add_request(f"{begun}-{i}", {"prompt_token_ids": prompt}, params)
    have: set[str] = set()
    stamps: list[float] = []
    while served.has_unfinished_requests():
        outputs, now = served.step(), time.perf_counter()
        have |= {o.request_id for o in outputs}
        if len(have) == len(ids) and len(stamps) <= new_tokens:
            stamps.append(now)
    return stamps[0] - begun, [after - before for before, after in pairwise(stamps)]
