"""The baseline sets that a plan is compared with at the same number of drops: what one would try without a search."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point
from spd_calib.formats.profile import Comparison

from .whole_plans import Calibration

SEEDS = range(5)


@dataclass(frozen=True)
class Baselines:
    """The baseline sets among `drops`, which are all that may be dropped.

    The paper's order is measured when it is first needed.
    """

    drops: Drops
    calibration: Calibration

    @cached_property
    def paper_order(self) -> list[Point]:
        """Return the attentions' sync points in the paper's order, least sensitive first."""
        longer = back_to_front(self.drops)
        # not remembered: the search is to know the same without them; with none dropped others may be, always
        *measured, base = self.calibration.measure_new([*longer, NOTHING_DROPPED])
        return paper_order([d.points[0] for d in longer], measured, base=base.kl)

    def of_size(self, n: int) -> dict[str, Drops]:
        """Return the baseline sets of n sync points, by name."""
        return baseline_sets(self.drops, n, paper_order=self.paper_order)

    def compare(self, chosen: Drops) -> dict[str, Comparison]:
        """Return what `chosen` ('this plan') and the baseline sets of its size cost, by name; nothing for no drops."""
        if not chosen:
            return {}
        named = {"this plan": chosen, **self.of_size(len(chosen))}
        return dict(zip(named, self.calibration.measure(list(named.values())), strict=True))


def baseline_sets(drops: Drops, n: int, *, paper_order: Sequence[Point]) -> dict[str, Drops]:
    """Return sets of n of `drops`, by name. The attentions' sync points come first, MLPs' where those do not suffice.

    `paper_order`: the attentions' sync points in the paper's order, least sensitive first.
    """
    attention = [p for p in drops if p.sync_point == "attention"]
    mlp = [p for p in drops if p.sync_point == "mlp"]
    spread = attention if n <= len(attention) else drops.points
    found: dict[str, Sequence[Point]] = {
        "the paper's back-to-front order": [*paper_order, *reversed(mlp)][:n],
        "the last": [*reversed(attention), *reversed(mlp)][:n],
        "evenly spaced": [spread[(2 * i + 1) * len(spread) // (2 * n)] for i in range(n)],
    }
    for seed in SEEDS:
        found[f"random, seed {seed}"] = random.Random(seed).sample(drops.points, n)
    return {name: drops.only(points) for name, points in found.items()}


def paper_order(points: Sequence[Point], cumulative: Sequence[Comparison], *, base: float = 0.0) -> list[Point]:
    """Return the attentions' sync points by what each adds to those behind it, least first (paper, section 4.2).

    `cumulative` holds, for each of `points` in the order of the blocks, what dropping it and all behind it costs;
    `base` is what dropping none of them costs.
    """
    following = [m.kl for m in cumulative[1:]] + [base]
    added = [m.kl - after for m, after in zip(cumulative, following, strict=True)]
    return [p for _, p in sorted(zip(added, points, strict=True), key=lambda pair: (pair[0], pair[1].block))]


def back_to_front(drops: Drops) -> list[Drops]:
    """Return the sets that `paper_order` wants measured: each attention's sync point with all attentions' behind it."""
    attention = [p for p in drops if p.sync_point == "attention"]
    return [drops.only(attention[i:]) for i in range(len(attention))]
