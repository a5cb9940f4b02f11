"""Watching what a model's routers say, and which experts they choose."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spd_calib.models.experts import Routing

from .block import Block

Chosen = Mapping[int, Tensor]
"""The experts chosen for each token, [B * T, k], by the block of the mixture of experts."""


@contextmanager
def watching_routers(blocks: Sequence[Block]) -> Iterator[dict[int, Tensor]]:
    """Collect, while this lasts, what the routers choose; of several forwards, what they chose in the last."""
    chosen: dict[int, Tensor] = {}
    with telling_choices(blocks, chosen.__setitem__):
        yield chosen


def telling_choices(blocks: Sequence[Block], tell: Callable[[int, Tensor], None]) -> AbstractContextManager[None]:
    """Call `tell`, while this lasts, with every choice of a router: its block, and the experts chosen [B * T, k]."""
    return telling_routers(blocks, lambda block, routing: tell(block, routing.chosen))


@contextmanager
def telling_routers(blocks: Sequence[Block], tell: Callable[[int, Routing], None]) -> Iterator[None]:
    """Call `tell`, while this lasts, with all that a router says whenever it is asked, and before that its block."""
    hooks = [
        block.experts.router.register_forward_hook(partial(_tell, tell, block))
        for block in blocks
        if block.experts is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tell(tell: Callable[[int, Routing], None], block: Block, router: nn.Module, args: tuple, given: Any) -> None:
    assert block.experts is not None
    tell(block.index, Routing.of(block.experts, given))


def tokens_routed_alike(dense: Chosen, planned: Chosen, counted: Tensor) -> list[float]:
    """Return, of each sequence, the number of tokens routed as dense, those `counted` [B, T] (True) of it.

    A token counts by the share of the mixtures whose experts are the same set in both. A mixture that is not in
    `planned` was not run anew, since nothing before it changed: it counts as the same. Empty without mixtures.
    """
    if not dense:
        return []
    alike = [
        (chosen.sort(-1).values == planned.get(block, chosen).sort(-1).values).all(-1)
        for block, chosen in dense.items()
    ]
    of_tokens = torch.stack(alike).double().mean(0).view(counted.shape)
    return (of_tokens * counted.to(of_tokens.device)).sum(-1).tolist()
