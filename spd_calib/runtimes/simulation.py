"""The simulation's side of a check: what a runtime was asked, on simulated ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spd_calib.formats.drops import Drops
from spd_calib.formats.phases import ByPhase
from spd_calib.parallel.model import TensorParallelLM


@dataclass(frozen=True)
class SimulatedRun:
    """Log-probabilities of prompts and their continuations on simulated ranks; one list a prompt."""

    prompt: list[list[float]]  # of every prompt token but the first
    chosen: list[list[float]]  # of the tokens that the runtime chose
    best: list[list[float]]  # of the tokens that the simulation would have chosen
    bytes: list[int] = field(default_factory=list)  # of each block's messages, over all tokens


@torch.no_grad()
def simulate(
    lm: TensorParallelLM,
    prompts: Sequence[Sequence[int]],
    *,
    continuations: Sequence[Sequence[int]],
    drops: Drops | ByPhase,
) -> SimulatedRun:
    """Return log-probabilities of prompts and of the continuations a runtime gave them, as token ids, under `drops`.

    Where each phase has a choice of its own, the tokens are run as they are served: the prompt, then one by one.
    """
    run = _at_once if ByPhase.of(drops).one_choice else _as_served
    out = SimulatedRun([], [], [])
    with lm.running(drops), counting_bytes(lm) as sent:
        for prompt, tokens in zip(prompts, continuations, strict=True):
            ids = torch.tensor([[*prompt, *tokens]], device=lm.device)
            log_p = run(lm, ids[:, :-1], len(prompt))[0].float().log_softmax(-1)  # [T - 1, V], t predicts token t + 1
            of_next = log_p.gather(-1, ids[0, 1:, None])[:, 0].tolist()
            out.prompt.append(of_next[: len(prompt) - 1])
            out.chosen.append(of_next[len(prompt) - 1 :])
            out.best.append(log_p[len(prompt) - 1 :].amax(-1).tolist())
    out.bytes.extend(sent)
    return out


def _at_once(lm: TensorParallelLM, ids: Tensor, prompt: int) -> Tensor:
    return lm(ids)


def _as_served(lm: TensorParallelLM, ids: Tensor, prompt: int) -> Tensor:
    """Return logits [B, T, V] of token ids [B, T], of which the first `prompt` are run at once, the others by one."""
    found, cache = [], None
    for tokens in ids.split([prompt, *[1] * (ids.shape[1] - prompt)], dim=1):
        final, cache = lm.extend(tokens, cache)
        found.append(lm.logits(final))
    return torch.cat(found, 1)


@contextmanager
def counting_bytes(lm: TensorParallelLM) -> Iterator[list[int]]:
    """Count, while this lasts, the bytes of each block's messages; the list it yields holds one number a block."""
    sent = [0] * lm.num_blocks

    def add(sign: int, index: int, *_: Any) -> None:
        sent[index] += sign * lm.comm.bytes

    hooks = [
        hook
        for i, block in enumerate(lm.blocks)
        for hook in (
            block.register_forward_pre_hook(partial(add, -1, i)),
            block.register_forward_hook(partial(add, 1, i)),
        )
    ]
    try:
        yield sent
    finally:
        for hook in hooks:
            hook.remove()
