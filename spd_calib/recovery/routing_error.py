"""Adding to the error that training lessens what a mixture's routers say otherwise than the dense model's do.

A choice has no gradient, and the model's output tells nothing of experts that were not chosen. So each dropped block's
router is held to what the dense model's says of every expert at the same token: KL(dense || planned) of the softmax of
their logits, which falls to zero where both choose, and weigh, alike, whatever scores a model makes of the logits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.models.experts import Routing
from spd_calib.parallel.routing import telling_routers
from spd_calib.parallel.streams import Streams

from .feed import Batch, Feed

ROUTING = 0.1  # of a router's KL, to one of the model's own error

Routings = Mapping[int, Routing]
"""The sayings of the routers on a batch's tokens, by the block of the mixture of experts."""


def routing_error(dense: Routings, planned: Routings, mask: Tensor) -> Tensor:
    """Return what is added to each token's error, [B, T] as `mask`: ROUTING times the mean KL of the routers `planned`.

    Zero where there are none.
    """
    found = torch.zeros(mask.shape, device=mask.device)
    for block, routing in planned.items():
        log_p, log_q = (r.logits.float().log_softmax(-1) for r in (dense[block], routing))
        found = found + (log_p.exp() * (log_p - log_q)).sum(-1).view(mask.shape)
    return found * (ROUTING / max(1, len(planned)))


@torch.no_grad()
def routed_in_dense_block(feed: Feed, batch: Batch) -> Routings:
    """Return what the dense model's router says in the feed's present block; nothing where that has none."""
    block = feed.model.lm.blocks[feed.index]
    return {block.index: block.route(feed.dense_read(batch))} if block.experts else {}


@torch.no_grad()
def routed_in_dense_model(feed: Feed, batch: Batch, *, last: int) -> Routings:
    """Return what the dense model's routers say in the blocks up to `last`, run anew: nothing is kept of the text.

    The feed must not have moved yet.
    """
    found: dict[int, Routing] = {}
    s, blocks = Streams(batch.dense), feed.model.lm.blocks[: last + 1]
    with telling_routers(blocks, found.__setitem__):
        for block, kwargs in zip(blocks, batch.kwargs, strict=False):
            s = block.run(s, NOTHING_DROPPED, **kwargs)
    return found
