"""What anyone would try first: the sets a plan is held against at the same number of drops."""

import random
from collections.abc import Sequence

from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Comparison, Point

SEEDS = range(5)


def obvious_sets(points: Sequence[Point], n: int, back_to_front: Sequence[Point]) -> dict[str, list[Point]]:
    """By name, sets of n of `points`. The attention's sync points come first, the MLPs' where they do not suffice.

    `back_to_front`: the attention's sync points in the paper's order, least sensitive first.
    """
    attention = [p for p in points if p.sync_point == "attention"]
    ordered = sorted(points, key=lambda p: (p.block, p.sync_point == "mlp"))
    mlp = [p for p in ordered if p.sync_point == "mlp"]
    several = attention if n <= len(attention) else ordered
    found = {
        "the paper's back-to-front order": [*back_to_front, *reversed(mlp)][:n],
        "the last": [*sorted(attention, key=lambda p: -p.block), *reversed(mlp)][:n],
        "evenly spaced": [sorted(several, key=ordered.index)[(2 * i + 1) * len(several) // (2 * n)] for i in range(n)],
    }
    for seed in SEEDS:
        found[f"random, seed {seed}"] = random.Random(seed).sample(ordered, n)
    return found


def paper_order(points: Sequence[Point], cumulative: Sequence[Comparison]) -> list[Point]:
    """The attention's sync points by what each adds to those behind it, least first (paper, section 4.2).

    `cumulative` holds, for each of `points` in the order of the blocks, what dropping it and all behind it costs.
    """
    following = [m.kl for m in cumulative[1:]] + [0.0]
    added = [m.kl - after for m, after in zip(cumulative, following, strict=True)]
    return [p for _, p in sorted(zip(added, points, strict=True), key=lambda pair: (pair[0], pair[1].block))]


def back_to_front_sets(points: Sequence[Point], strategies: dict[Point, Strategy]) -> list[dict[Point, Strategy]]:
    """The sets `paper_order` wants measured: each of `points` (in the order of the blocks) with all behind it."""
    return [{p: strategies[p] for p in points[i:]} for i in range(len(points))]
