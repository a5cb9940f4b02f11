"""A second-order model of what a set of dropped sync points costs, and the cheapest set of every size by it.

The KL of a set is the sum of a matrix over all ordered pairs of the terms that count in it: one for each sync point,
and one for two consecutive ones that are both dropped (sensitivity/fisher.py). A profile of single measurements fills
the diagonal alone.

Outside this file a set of sync points is a Drops; inside, where numpy needs it, the indices of its points.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.profile import Fisher

EXACT = 12  # sync points up to which every set is looked at
Indices = frozenset[int]  # into Interactions.points


def follows(a: Point, b: Point) -> bool:
    """Say whether `b` is the sync point that the model meets next after `a`."""
    if a.sync_point == "attention":
        return (b.block, b.sync_point) == (a.block, "mlp")
    return (b.block, b.sync_point) == (a.block + 1, "attention")


@dataclass(frozen=True)
class Interactions:
    """Predicts the KL of dropping any of the n sync points of `drops`.

    `matrix` [T + 1, T + 1]: first the n points in the model's order, then the pairs; the last row and column are 0.
    `pair[i]` is the term of points i and i + 1 together, or T where there is none.
    """

    drops: Drops
    matrix: np.ndarray
    pair: np.ndarray
    base: float = 0.0  # KL with none of them dropped: above 0 for a checkpoint whose own drops stay

    @classmethod
    def of_singles(cls, drops: Drops, kl: Mapping[Point, float], *, base: float = 0.0) -> "Interactions":
        """Return the model of a profile of single measurements, `kl` by point (nats per token).

        The costs of a set add up. Only for two consecutive sync points, whose debts add up before they are settled, do
        the amplitudes add, (sqrt a + sqrt b)^2: a guess on the safe side, until a set is measured.
        """
        n, points = len(drops), drops.points
        matrix = np.zeros((n + 1, n + 1))
        for i, point in enumerate(points):
            matrix[i, i] = kl[point]
            if i + 1 < n and follows(point, points[i + 1]):
                matrix[i, i + 1] = matrix[i + 1, i] = np.sqrt(max(kl[point], 0) * max(kl[points[i + 1]], 0))
        return cls(drops, matrix, np.full(n, n), base)

    @classmethod
    def of_fisher(cls, fisher: Fisher) -> "Interactions":
        """Return the model of all sync points that a profile's predictions are about, each block-dropped."""
        terms = [tuple(term) for term in fisher.terms]
        points = tuple(sorted(term[0] for term in terms if len(term) == 1))
        order = [(p,) for p in points] + [term for term in terms if len(term) == 2]
        index = [terms.index(term) for term in order]
        t = len(terms)
        full = np.zeros((t, t))
        for i, row in enumerate(fisher.matrix):
            full[i, i:] = full[i:, i] = row
        matrix = np.zeros((t + 1, t + 1))
        matrix[:t, :t] = full[np.ix_(index, index)]
        pair = [order.index(ab) if (ab := points[i : i + 2]) in order else t for i in range(len(points))]
        return cls(Drops.of(dict.fromkeys(points, Strategy.BLOCK_DROP)), matrix, np.array(pair))

    @property
    def points(self) -> tuple[Point, ...]:
        """Return the n sync points in the model's order."""
        return self.drops.points

    def restricted(self, allowed: Iterable[Point]) -> "Interactions":
        """Return the model of those points alone that are among `allowed`."""
        drops = self.drops.only(allowed)
        kept = [i for i, p in enumerate(self.points) if p in drops]
        pairs = [i for i in kept if i + 1 in kept and self.pair[i] < len(self.matrix) - 1]
        terms = kept + [int(self.pair[i]) for i in pairs]
        matrix = np.zeros((len(terms) + 1,) * 2)
        matrix[:-1, :-1] = self.matrix[np.ix_(terms, terms)]
        pair = [len(kept) + pairs.index(i) if i in pairs else len(terms) for i in kept]
        return Interactions(drops, matrix, np.array(pair), self.base)

    def kl(self, dropped: Iterable[Point]) -> float:
        """Return the predicted KL, nats per token, of dropping these points and no other."""
        return self._kl(self._indices(dropped))

    def front(self) -> list[Drops]:
        """Return the cheapest drops found of every size, from none to all."""
        return self.exact_front() if len(self.points) <= EXACT else self.greedy_front()

    def exact_front(self) -> list[Drops]:
        """Return the cheapest drops of every size, by looking at every set."""
        sizes = range(len(self._all) + 1)
        return [
            self._drops(min(map(frozenset, itertools.combinations(self._all, size)), key=self._kl)) for size in sizes
        ]

    def greedy_front(self) -> list[Drops]:
        """Return the cheapest drops found of every size, in two ways: by the cheapest addition from none upwards, and
        by the cheapest removal from all downwards; at each size points are swapped until no swap helps.
        """
        n = len(self.points)
        up: list[Indices] = [frozenset()]
        for _ in range(n):
            up.append(self._swapped(up[-1] | {int(np.argmin(self._additions(up[-1])))}))
        down: list[Indices] = [frozenset(self._all)]
        for _ in range(n):
            smaller = min((down[-1] - {i} for i in down[-1]), key=self._kl)
            down.append(self._swapped(smaller))
        return [self._drops(min(pair, key=self._kl)) for pair in zip(up, reversed(down), strict=True)]

    def rivals(self, best: Drops, *, count: int) -> list[Drops]:
        """Return `count` drops of the size of `best`: itself, then the cheapest that one or two swaps lead to."""
        first = self._indices(best)
        found = {first: self._kl(first)}
        for start in (first, *sorted(self._swaps(first), key=self._kl)[: count // 2]):
            found.update((s, self._kl(s)) for s in self._swaps(start) if s not in found)
        others = sorted((s for s in found if s != first), key=lambda s: (found[s], sorted(s)))
        return [self._drops(s) for s in [first, *others][:count]]

    @cached_property
    def _all(self) -> range:
        return range(len(self.points))

    def _indices(self, points: Iterable[Point]) -> Indices:
        return frozenset(map(self.points.index, points))

    def _drops(self, chosen: Indices) -> Drops:
        return self.drops.only(self.points[i] for i in chosen)

    def _kl(self, chosen: Indices) -> float:
        v = self._terms(chosen)
        return self.base + float(v @ self.matrix @ v)

    def _terms(self, chosen: Indices) -> np.ndarray:
        """Return [T + 1]: 1 for every term that counts."""
        v = np.zeros(len(self.matrix))
        v[list(chosen)] = 1
        v[[self.pair[i] for i in chosen if i + 1 in chosen]] = 1
        v[-1] = 0
        return v

    def _additions(self, chosen: Indices) -> np.ndarray:
        """Return the KL of `chosen` with each other point added, [n]; infinite for those in it."""
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

    def _swapped(self, chosen: Indices) -> Indices:
        """Return `chosen` after the best swap of a member for another point, again and again, until none is cheaper."""
        best = self._kl(chosen)
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

    def _swaps(self, chosen: Indices) -> Iterator[Indices]:
        """Yield every set that one swap of a member for another point leads to."""
        others = [j for j in self._all if j not in chosen]
        return (chosen - {i} | {j} for i in sorted(chosen) for j in others)
