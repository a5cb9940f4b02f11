"""The program of each rank in a check: it runs the plan and the dense model, and writes down what came out.

torchrun --nproc-per-node N -m spd_calib.runtimes.torchrun.worker JOB.json OBSERVED.json
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor
from transformers import GenerationConfig

from spd_calib.formats.files import write_text
from spd_calib.models.plan_files import load_plan_by_phase
from spd_calib.parallel.ending import ending_together
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.routing import telling_choices
from spd_calib.parallel.session import open_session
from spd_calib.parallel.streams import Streams
from spd_calib.ranks import rank
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.simulation import counting_bytes


class CheckJob(BaseModel):
    """The job of the ranks of a check; prompts are token ids."""

    plan: Path
    model: str
    prompts: list[list[int]]
    new_tokens: int
    device: str
    dtype: str


class PlannedAndDense(BaseModel):
    """The same prompts under the plan and with every sync point kept."""

    planned: Observed
    dense: Observed


def main() -> None:
    with ending_together():
        job = CheckJob.model_validate_json(Path(sys.argv[1]).read_text())
        write_text(Path(sys.argv[2]), run(job).model_dump_json())


def run(job: CheckJob) -> PlannedAndDense:
    """Run a job on this rank; all ranks return the same. Raises InputError as load_plan and open_session do."""
    plan, drops = load_plan_by_phase(job.plan, ranks=[rank()])
    session = open_session(job.model, plan.tensor_parallel.size, expected=plan.model)
    lm = session.load(job.device, job.dtype, drops=drops)
    with lm.running(drops):
        planned = observe(lm, job)
    return PlannedAndDense(planned=planned, dense=observe(lm, job))


@torch.no_grad()
def observe(lm: TensorParallelLM, job: CheckJob) -> Observed:
    """Run every prompt of the job under what `lm` runs at present, each continued greedily with the KV cache."""
    prompt, tokens, chosen, sent = [], [], [], [0] * lm.num_blocks
    lm.model.generation_config = GenerationConfig()  # nothing ends a continuation, nothing bends the probabilities
    with (
        _counting_all_reduces(lm) as counts,
        _digesting_streams(lm) as digests,
        _digesting_routers(lm) as choices,
    ):
        for ids in job.prompts:
            row = torch.tensor([ids], device=lm.device)
            log_p = lm(row)[0].float().log_softmax(-1)
            prompt.append(log_p[:-1].gather(-1, row[0, 1:, None])[:, 0].tolist())
            with counting_bytes(lm) as sent_here:
                out: Any = lm.model.generate(  # type: ignore[operator]
                    row,
                    attention_mask=torch.ones_like(row),
                    do_sample=False,
                    max_new_tokens=job.new_tokens,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            sent = list(map(sum, zip(sent, sent_here, strict=True)))
            continuation: Tensor = out.sequences[0, len(ids) :]
            steps = torch.stack([step[0] for step in out.logits]).float().log_softmax(-1)
            tokens.append(continuation.tolist())
            chosen.append(steps.gather(-1, continuation[:, None])[:, 0].tolist())
    return Observed(
        prompt=prompt,
        tokens=tokens,
        chosen=chosen,
        all_reduces=_of_all_ranks(counts),
        streams=_of_all_ranks([digest.hexdigest() for digest in digests]),
        experts=_of_all_ranks([digest.hexdigest() for digest in choices]) if choices else [],
        bytes=_of_all_ranks(sent),
    )


@contextmanager
def _counting_all_reduces(lm: TensorParallelLM) -> Iterator[list[int]]:
    """Count the all-reduces of each forward into the list it yields, while this lasts."""
    counts: list[int] = []

    def before(*_: Any) -> None:
        counts.append(-lm.comm.all_reduces)

    def after(*_: Any) -> None:
        counts[-1] += lm.comm.all_reduces

    hooks = [lm.model.register_forward_pre_hook(before), lm.model.register_forward_hook(after)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _digesting_streams(lm: TensorParallelLM) -> Iterator[list[Any]]:
    """Hash what leaves each block, over all forwards, into the sha256 objects it yields, while this lasts."""

    def hook_of(digest: Any) -> Callable[[Any, Any, Streams], None]:
        def hook(_: Any, args: Any, streams: Streams) -> None:
            digest.update(stream_bytes(streams))

        return hook

    digests = [hashlib.sha256() for _ in lm.blocks]
    hooks = [block.register_forward_hook(hook_of(d)) for block, d in zip(lm.blocks, digests, strict=True)]
    try:
        yield digests
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _digesting_routers(lm: TensorParallelLM) -> Iterator[list[Any]]:
    """Hash the experts that each router chooses, over all forwards, into the sha256 objects it yields."""
    digests = {block: hashlib.sha256() for block in lm.mixtures}

    def add(block: int, chosen: Tensor) -> None:
        digests[block].update(chosen.contiguous().cpu().numpy().tobytes())

    with telling_choices(lm.blocks, add):
        yield list(digests.values())


def stream_bytes(streams: Streams) -> bytes:
    """Return what this rank's next block reads; after a deferred MLP sync point the part that all ranks share."""
    stream = streams.read(0) if streams.settled else streams.shared
    return stream.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _of_all_ranks(value: list) -> list[list]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


if __name__ == "__main__":
    main()
