"""Carrying many plans through the blocks together, for a model whose blocks are read from disk one at a time.

Each block's weights are then read once for all plans. Until the first block that it drops, a plan shares the dense
model's hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.models.hooks import before_each
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.routing import Chosen, telling_choices
from spd_calib.parallel.streams import Streams

HELD_BYTES = 2**29  # hidden states of plans held at a time; beyond that, the blocks are read once more


@dataclass(frozen=True)
class Carried:
    """Holds what leaves the final norm, as TensorParallelLM.resume returns it, and the experts chosen on the way."""

    final: Tensor
    experts: Chosen


def at_a_time(lm: TensorParallelLM, input_ids: Tensor) -> int:
    """Return how many plans' hidden states fit in HELD_BYTES, at least 1, for a batch of token ids [B, T].

    Each plan holds the part that all ranks share, and one tensor of that size for each rank.
    """
    states = 1 + len(lm.comm.ranks)
    size = input_ids.numel() * lm.blocks[0].width * lm.model.dtype.itemsize * states
    return max(1, HELD_BYTES // size)


@torch.no_grad()
def run_in_lockstep(lm: TensorParallelLM, input_ids: Tensor, plans: Sequence[Drops]) -> tuple[Carried, list[Carried]]:
    """Run a batch of token ids [B, T] through the dense model and through every plan; return what either gives."""
    plans = [lm.fitted(drops) for drops in plans]
    first = [drops.first_difference(NOTHING_DROPPED) for drops in plans]
    states: list[Streams | None] = [None] * len(plans)
    final: list[Tensor] = []
    of_dense: dict[int, Tensor] = {}
    of_plans = [dict[int, Tensor]() for _ in plans]
    running = of_dense  # the choices of what runs at the moment

    def carry(block: int, entered: Tensor | Streams, kwargs: dict) -> None:
        """Run the block for every plan that drops something up to here, just before the dense model runs it."""
        nonlocal running
        for i, drops in enumerate(plans):
            if (begin := first[i]) is not None and begin <= block:
                running = of_plans[i]
                states[i] = lm.blocks[block].run(states[i] or Streams.of(entered), drops, **kwargs)
        running = of_dense

    def tell(block: int, chosen: Tensor) -> None:
        running[block] = chosen

    hook = lm.final_norm.register_forward_hook(lambda module, args, out: final.append(out))
    try:
        with before_each(lm.blocks, carry), telling_choices(lm.blocks, tell), lm.running(NOTHING_DROPPED):
            lm.model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        hook.remove()
    finals = [final[0] if s is None else lm.final_norm(s) for s in states]
    return Carried(final[0], of_dense), [Carried(*of_plan) for of_plan in zip(finals, of_plans, strict=True)]
