"""The simulation's side of a check: what a runtime was asked, on simulated ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spd_calib.formats.drops import Drops
from spd_calib.parallel.model import TensorParallelLM


@dataclass(frozen=True)
class SimulatedRun:
    """Log-probabilities of prompts and their continuations on simulated ranks; one list a prompt."""

    prompt: list[list[float]]  # of every prompt token but the first
    chosen: list[list[float]]  # of the tokens that the runtime chose
    best: list[list[float]]  # of the tokens that the simulation would have chosen


@torch.no_grad()
def simulate(
    lm: TensorParallelLM, prompts: Sequence[Sequence[int]], *, continuations: Sequence[Sequence[int]], drops: Drops
) -> SimulatedRun:
    """Return log-probabilities of prompts and of the continuations a runtime gave them, as token ids, under `drops`."""
    out = SimulatedRun([], [], [])
    with lm.running(drops):
        for prompt, tokens in zip(prompts, continuations, strict=True):
            ids = torch.tensor([[*prompt, *tokens]], device=lm.device)
            log_p = lm(ids[:, :-1])[0].float().log_softmax(-1)  # [T - 1, V], position t predicts token t + 1
            of_next = log_p.gather(-1, ids[0, 1:, None])[:, 0].tolist()
            out.prompt.append(of_next[: len(prompt) - 1])
            out.chosen.append(of_next[len(prompt) - 1 :])
            out.best.append(log_p[len(prompt) - 1 :].amax(-1).tolist())
    return out
