"""Tiny planned models, and random text for them."""

import tiny

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.planning.model_sizes import Added
from spd_calib.planning.replication import Affordable
from spd_calib.recovery.planned_model import PlannedModel

EVERY = tuple(tuple(g for g in range(4) if g != rank) for rank in range(4))
"""The KV groups of the other three of four ranks, by rank."""


def heads(blocks: int) -> Affordable:
    """All heads of other ranks, on four ranks, in so many blocks."""
    return Affordable(blocks, EVERY, None, Added(), 0.1)


def sequences(n: int, length: int = 24, seed: int = 0) -> list[list[int]]:
    """n sequences of random token ids."""
    return tiny.tokens(n, length, seed=seed).tolist()


def planned(family: str = "llama", *, tp: int = 4, layers: int = 2, drop=None) -> PlannedModel:
    """A tiny model that drops the attention's sync point of the blocks `drop`, by default of all, by block_drop."""
    drop = range(layers) if drop is None else drop
    drops = Drops.of({Point(i, "attention"): Strategy.BLOCK_DROP for i in drop})
    return PlannedModel(tiny.build(family, layers=layers), tp, drops)


def extreme(model: PlannedModel) -> dict:
    """The tier that is treated with everything, for every block of the plan."""
    return dict.fromkeys(model.students, "extremely sensitive")
