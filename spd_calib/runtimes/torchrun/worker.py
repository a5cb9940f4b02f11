"""What each rank does in a check: run the plan and the dense model, and write down what came out.

torchrun --nproc-per-node N -m spd_calib.runtimes.torchrun.worker JOB.json SEEN.json
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor
from transformers import GenerationConfig

from spd_calib.formats.files import read, write_text
from spd_calib.formats.plan import Plan
from spd_calib.parallel.compensation import load_compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.ranks import ending_together


class Job(BaseModel):
    plan: Path
    model: str
    prompts: list[list[int]]
    new_tokens: int
    device: str
    dtype: str


class Seen(BaseModel):
    """Lists of lists hold one list a prompt, or a rank."""

    prompt: list[list[float]]  # log p of its tokens, from the second on
    tokens: list[list[int]]  # the greedy continuation, decoded with the KV cache
    chosen: list[list[float]]  # log p of these
    all_reduces: list[list[int]]  # by rank, of each forward
    streams: list[list[str]]  # by rank, a digest of the residual stream after each block, over all forwards


class Report(BaseModel):
    plan: Seen
    dense: Seen


def main() -> None:
    with ending_together():
        job = Job.model_validate(json.loads(Path(sys.argv[1]).read_text()))
        write_text(Path(sys.argv[2]), run(job).model_dump_json())


def run(job: Job) -> Report:
    plan = read(Plan, job.plan)
    lm = open_session(job.model, plan.tensor_parallel.size, plan.model).load(job.device, job.dtype)
    set_plan(lm, plan, job.plan)
    planned = see(lm, job)
    lm.keep_all()
    return Report(plan=planned, dense=see(lm, job))


def set_plan(lm: TensorParallelLM, plan: Plan, path: Path) -> None:
    """Make `lm` run the plan: its strategies, and the compensation in the file beside it."""
    lm.set_strategies(plan.strategies, plan.mlp_strategies)
    lm.set_compensation(load_compensation(plan, path, lm.comm.ranks))


@torch.no_grad()
def see(lm: TensorParallelLM, job: Job) -> Seen:
    """Run every prompt under the present strategies; the same on all ranks, but for what is listed by rank."""
    counts: list[int] = []
    digests = [hashlib.sha256() for _ in lm.blocks]

    def before(*_: Any) -> None:
        counts.append(-lm.comm.all_reduces)

    def after(*_: Any) -> None:
        counts[-1] += lm.comm.all_reduces

    hooks = [lm.model.register_forward_pre_hook(before), lm.model.register_forward_hook(after)]
    for digest, block in zip(digests, lm.blocks, strict=True):
        hooks.append(block.register_forward_hook(lambda m, a, s, digest=digest: digest.update(_bytes(s))))
    prompt, tokens, chosen = [], [], []
    lm.model.generation_config = GenerationConfig()  # nothing ends a continuation, nothing bends the probabilities
    try:
        for ids in job.prompts:
            row = torch.tensor([ids], device=lm.device)
            log_p = lm(row)[0].float().log_softmax(-1)
            prompt.append(log_p[:-1].gather(-1, row[0, 1:, None])[:, 0].tolist())
            out: Any = lm.model.generate(  # type: ignore[operator]
                row,
                attention_mask=torch.ones_like(row),
                do_sample=False,
                max_new_tokens=job.new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
            continuation: Tensor = out.sequences[0, len(ids) :]
            steps = torch.stack([step[0] for step in out.logits]).float().log_softmax(-1)
            tokens.append(continuation.tolist())
            chosen.append(steps.gather(-1, continuation[:, None])[:, 0].tolist())
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(
        prompt=prompt,
        tokens=tokens,
        chosen=chosen,
        all_reduces=_of_all_ranks(counts),
        streams=_of_all_ranks([digest.hexdigest() for digest in digests]),
    )


def _bytes(s: Any) -> bytes:
    """What the rank's next block reads; after a deferred MLP sync point the part that the ranks share."""
    stream: Tensor = s.shared if s.debt is not None else s.read(0)
    return stream.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _of_all_ranks(value: list) -> list[list]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


if __name__ == "__main__":
    main()
