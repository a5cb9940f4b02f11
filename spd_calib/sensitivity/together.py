"""Many experiments carried through the blocks together, for a model whose blocks are read from disk one at a time.

Each block's weights are then read once for all of them. Up to its first dropped block an experiment is the dense model.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spd_calib.formats.common import Strategy
from spd_calib.parallel.block import Block
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.streams import Streams

HELD_BYTES = 2**29  # hidden states of experiments held at a time; beyond that, the blocks are read once more


class Strategies(Protocol):
    """Of every block (measure.Experiment)."""

    @property
    def attention(self) -> tuple[Strategy, ...]: ...
    @property
    def mlp(self) -> tuple[Strategy, ...]: ...
    @property
    def first(self) -> int: ...


def at_a_time(lm: TensorParallelLM, input_ids: Tensor) -> int:
    """Experiments whose hidden states are held together: the shared part, and one of each rank's own."""
    states = 1 + len(lm.comm.ranks)
    size = input_ids.numel() * lm.blocks[0].width * lm.model.dtype.itemsize * states
    return max(1, HELD_BYTES // size)


@torch.no_grad()
def run_together(
    lm: TensorParallelLM, input_ids: Tensor, experiments: Sequence[Strategies]
) -> tuple[Tensor, list[Tensor]]:
    """What leaves the final norm: of the dense model [B, T, d], and of each experiment as from TensorParallelLM.resume.

    input_ids: [B, T]. Leaves every sync point kept.
    """
    lm.keep_all()
    states: list[Streams | None] = [None] * len(experiments)
    final: list[Tensor] = []

    def carry(block: Block, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take every experiment that has left the dense model's way through `block`, before the dense model goes."""
        others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        entered = args[0] if args else kwargs["hidden_states"]
        entered = entered if isinstance(entered, Streams) else Streams(entered)
        for i, experiment in enumerate(experiments):
            if experiment.first <= block.index:
                lm.set_strategies(experiment.attention, experiment.mlp)
                states[i] = block.forward(states[i] or entered, **others)
        lm.keep_all()

    def keep_final(module: nn.Module, args: tuple, out: Tensor) -> None:
        final.append(out)

    hooks: list[Any] = [block.register_forward_pre_hook(carry, with_kwargs=True) for block in lm.blocks]
    hooks.append(lm.final_norm.register_forward_hook(keep_final))
    try:
        lm.model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return final[0], [final[0] if s is None else lm.final_norm.forward(s) for s in states]
