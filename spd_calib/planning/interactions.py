"""What a set of dropped sync points costs, to second order, and the cheapest set of every size.

The KL of a set is the sum of a matrix over all ordered pairs of the terms that count in it: one for each sync point,
and one for two consecutive ones that are both dropped (sensitivity/fisher.py). A profile of single measurements fills
the diagonal alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spd_calib.formats.profile import Fisher, Point

Set = frozenset[int]  # indices into Interactions.points
EXACT = 12  # sync points up to which every set is looked at


def follows(a: Point, b: Point) -> bool:
    """Is `b` the sync point the model meets next after `a`?"""
    if a.sync_point == "attention":
        return (b.block, b.sync_point) == (a.block, "mlp")
    return (b.block, b.sync_point) == (a.block + 1, "attention")


@dataclass(frozen=True)
class Interactions:
    """`matrix` [T + 1, T + 1]: first the n points in the model's order, then the pairs; the last row and column are 0.

    `pair[i]` is the term of points i and i + 1 together, or T where there is none.
    """

    points: tuple[Point, ...]
    matrix: np.ndarray
    pair: np.ndarray
    base: float = 0.0  # of no point at all: of a recovered checkpoint, what it costs as it is

    @classmethod
    def of_singles(cls, costs: dict[Point, float], base: float = 0.0) -> "Interactions":
        """From single costs: they add up, but for consecutive sync points, whose debts add up before they are settled.

        Of those the amplitudes add, (sqrt a + sqrt b)^2: a guess on the safe side, until a set is measured.
        """
        points = tuple(sorted(costs, key=_order))
        n = len(points)
        matrix = np.zeros((n + 1, n + 1))
        for i, point in enumerate(points):
            matrix[i, i] = costs[point]
            if i + 1 < n and follows(point, points[i + 1]):
                matrix[i, i + 1] = matrix[i + 1, i] = np.sqrt(max(costs[point], 0) * max(costs[points[i + 1]], 0))
        return cls(points, matrix, np.full(n, n), base)

    @classmethod
    def of_fisher(cls, fisher: Fisher) -> "Interactions":
        terms = [tuple(term) for term in fisher.terms]
        points = tuple(sorted((term[0] for term in terms if len(term) == 1), key=_order))
        order = [(p,) for p in points] + [term for term in terms if len(term) == 2]
        index = [terms.index(term) for term in order]
        t = len(terms)
        full = np.zeros((t, t))
        for i, row in enumerate(fisher.matrix):
            full[i, i:] = full[i:, i] = row
        matrix = np.zeros((t + 1, t + 1))
        matrix[:t, :t] = full[np.ix_(index, index)]
        pair = [order.index(ab) if (ab := points[i : i + 2]) in order else t for i in range(len(points))]
        return cls(points, matrix, np.array(pair))

    def restricted(self, allowed: Sequence[Point]) -> "Interactions":
        """The same for some of the points only."""
        kept = [i for i, p in enumerate(self.points) if p in allowed]
        pairs = [i for i in kept if i + 1 in kept and self.pair[i] < len(self.matrix) - 1]
        terms = kept + [int(self.pair[i]) for i in pairs]
        matrix = np.zeros((len(terms) + 1,) * 2)
        matrix[:-1, :-1] = self.matrix[np.ix_(terms, terms)]
        pair = [len(kept) + pairs.index(i) if i in pairs else len(terms) for i in kept]
        return Interactions(tuple(self.points[i] for i in kept), matrix, np.array(pair), self.base)

    def kl(self, chosen: Set) -> float:
        v = self._terms(chosen)
        return self.base + float(v @ self.matrix @ v)

    def points_of(self, chosen: Set) -> list[Point]:
        return [self.points[i] for i in sorted(chosen)]

    def front(self) -> list[Set]:
        """The cheapest set found of every size, from none to all."""
        return self.exact_front() if len(self.points) <= EXACT else self.greedy_front()

    def exact_front(self) -> list[Set]:
        """By looking at every set."""
        return [
            min(map(frozenset, itertools.combinations(self._all, k)), key=self.kl) for k in range(len(self._all) + 1)
        ]

    def greedy_front(self) -> list[Set]:
        """Upwards, by the cheapest addition, and downwards from all of them; at each size swaps until none helps."""
        n = len(self.points)
        up: list[Set] = [frozenset()]
        for _ in range(n):
            up.append(self._swapped(up[-1] | {int(np.argmin(self._additions(up[-1])))}))
        down = [frozenset(self._all)]
        for _ in range(n):
            smaller = min((down[-1] - {i} for i in down[-1]), key=self.kl)
            down.append(self._swapped(smaller))
        return [min(pair, key=self.kl) for pair in zip(up, reversed(down), strict=True)]

    def rivals(self, best: Set, count: int) -> list[Set]:
        """`count` sets of the size of `best`: itself, then the cheapest that differ from it by one or two swaps."""
        found = {best: self.kl(best)}
        for start in (best, *sorted(self._swaps(best), key=self.kl)[: count // 2]):
            found.update((s, self.kl(s)) for s in self._swaps(start) if s not in found)
        return [best, *sorted((s for s in found if s != best), key=lambda s: (found[s], sorted(s)))][:count]

    @cached_property
    def _all(self) -> range:
        return range(len(self.points))

    def _terms(self, chosen: Set) -> np.ndarray:
        """[T + 1]: 1 for every term that counts."""
        v = np.zeros(len(self.matrix))
        v[list(chosen)] = 1
        v[[self.pair[i] for i in chosen if i + 1 in chosen]] = 1
        v[-1] = 0
        return v

    def _additions(self, chosen: Set) -> np.ndarray:
        """KL of `chosen` with each other point added, [n]; infinite for those in it."""
        n, last = len(self.points), len(self.matrix) - 1
        v = self._terms(chosen)
        g = self.matrix @ v
        before = [self.pair[i - 1] if i - 1 in chosen else last for i in range(n)]
        after = [self.pair[i] if i + 1 in chosen else last for i in range(n)]
        added = np.stack([np.arange(n), np.array(before), np.array(after)])  # the terms each addition brings
        own = self.matrix[added[:, None], added[None]].sum((0, 1))
        total = self.base + v @ g + 2 * g[added].sum(0) + own
        total[list(chosen)] = np.inf
        return total

    def _swapped(self, chosen: Set) -> Set:
        """`chosen` after the best swap of a member for another point, again and again, until none is cheaper."""
        best = self.kl(chosen)
        for _ in range(len(self.points)):
            trials = []
            for i in chosen:
                totals = self._additions(chosen - {i})
                totals[i] = np.inf
                trials.append((float(totals.min()), i, int(totals.argmin())))
            if not trials or min(trials)[0] >= best - 1e-12 * abs(best):
                return chosen
            best, out, into = min(trials)
            chosen = chosen - {out} | {into}
        return chosen

    def _swaps(self, chosen: Set) -> Iterator[Set]:
        others = [j for j in self._all if j not in chosen]
        return (chosen - {i} | {j} for i in sorted(chosen) for j in others)


def _order(point: Point) -> tuple[int, bool]:
    return point.block, point.sync_point == "mlp"
