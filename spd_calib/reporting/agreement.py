"""Comparing the sensitivities of two profiles: block by block, in rank, and in the sets they would drop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from spd_calib.formats.drops import Strategy, Sublayer
from spd_calib.formats.profile import Profile
from spd_calib.sensitivity.tiers import thresholds, tiers

BEYOND = 2.0  # standard errors, from which a difference is marked
DRAWS = 2000  # of Spearman's correlation within the standard errors


@dataclass(frozen=True)
class Row:
    """One sync point in both profiles. KL in nats per token; ranks from 1, the least sensitive."""

    block: int
    a: float
    a_stderr: float | None
    b: float
    b_stderr: float | None
    apart: float | None  # b - a, in its standard error; None where that is not known
    p: float | None  # of Welch's t, two-sided
    a_rank: int
    b_rank: int

    @property
    def beyond(self) -> bool:
        return self.apart is not None and abs(self.apart) > BEYOND


@dataclass(frozen=True)
class OtherSet:
    """A number of drops for which A and B would take other blocks: those that only one of them takes."""

    size: int
    only_a: list[int]
    only_b: list[int]


@dataclass(frozen=True)
class Agreement:
    """One kind of sync point under one strategy, over the blocks both profiles measured."""

    sync_point: Sublayer
    strategy: Strategy
    rows: list[Row]
    spearman: float | None  # None for fewer than three blocks
    spearman_range: tuple[float, float] | None  # 95 % of it, when every KL is drawn anew within its standard error
    kendall: float | None
    beyond_by_chance: float  # rows expected beyond BEYOND where nothing differs
    other_sets: list[OtherSet]  # of the sizes 1 to len(rows) - 1
    changed: list[str]  # blocks of another tier, a sentence each


def agreements(a: Profile, b: Profile, *, tested: bool) -> list[Agreement]:
    """Return how two profiles agree, for every kind of sync point and strategy that both hold.

    `tested`: their standard errors can tell whether a difference is one.
    """
    kinds: list[tuple[Strategy, Sublayer]] = [(s, kind) for kind in a.sync_points for s in a.strategies]
    return [
        _agreement(a, b, strategy=s, kind=kind, tested=tested)
        for s, kind in kinds
        if set(a.kl(s, kind)) & set(b.kl(s, kind))
    ]


def _agreement(a: Profile, b: Profile, *, strategy: Strategy, kind: Sublayer, tested: bool) -> Agreement:
    left, right = a.kl(strategy, kind), b.kl(strategy, kind)
    blocks = sorted(set(left) & set(right))
    lefts, rights = {i: left[i] for i in blocks}, {i: right[i] for i in blocks}
    orders = [sorted(blocks, key=lambda i: (found[i][0], i)) for found in (lefts, rights)]
    rows, by_chance = [], 0.0
    for block in blocks:
        n = (
            _sequences(a, strategy=strategy, kind=kind, block=block),
            _sequences(b, strategy=strategy, kind=kind, block=block),
        )
        apart, p, chance = _welch(left[block], right[block], sequences=n) if tested else (None, None, 0.0)
        ranks = [order.index(block) + 1 for order in orders]
        rows.append(Row(block, *left[block], *right[block], apart, p, ranks[0], ranks[1]))
        by_chance += chance
    values = np.array([[row.a for row in rows], [row.b for row in rows]])
    errors = np.array([[row.a_stderr for row in rows], [row.b_stderr for row in rows]], dtype=float)  # None: NaN
    ranked = len(rows) > 2 and all(len(set(v)) > 1 for v in values)
    return Agreement(
        sync_point=kind,
        strategy=strategy,
        rows=rows,
        spearman=float(stats.spearmanr(*values).statistic) if ranked else None,
        spearman_range=_spearman_range(values, errors) if ranked and tested else None,
        kendall=float(stats.kendalltau(*values).statistic) if ranked else None,
        beyond_by_chance=by_chance,
        other_sets=_other_sets(*orders),
        changed=_changed(rows),
    )


def _sequences(profile: Profile, *, strategy: Strategy, kind: Sublayer, block: int) -> int:
    return profile.text.sequences if profile.fisher else profile.of(strategy, kind)[block].sequences


def _welch(
    a: tuple[float, float | None], b: tuple[float, float | None], *, sequences: tuple[int, int]
) -> tuple[float | None, float | None, float]:
    """Return b - a in its standard error, its two-sided p, and the chance of a value beyond BEYOND where a equals b."""
    difference = b[0] - a[0]
    errors = [stderr for _, stderr in (a, b) if stderr is not None]
    error = math.hypot(*errors)
    if min(sequences) < 2 or len(errors) < 2 or error == 0:
        return (0.0, 1.0, 0.0) if difference == 0 else (None, None, 0.0)
    # in shares of the error, which may be tiny
    shares = [((s / error) ** 4) / (n - 1) for s, n in zip(errors, sequences, strict=True)]
    degrees = 1 / sum(shares)
    apart = difference / error
    return apart, float(2 * stats.t.sf(abs(apart), degrees)), float(2 * stats.t.sf(BEYOND, degrees))


def _spearman_range(values: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Return what 95 % of Spearman's correlations lie within, of values [2, blocks] drawn within their errors."""
    drawn = values + errors * np.random.default_rng(0).standard_normal((DRAWS, *values.shape))
    ranks = stats.rankdata(drawn, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    products = (ranks[:, 0] * ranks[:, 1]).sum(-1)
    found = products / np.sqrt((ranks[:, 0] ** 2).sum(-1) * (ranks[:, 1] ** 2).sum(-1))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _other_sets(a: Sequence[int], b: Sequence[int]) -> list[OtherSet]:
    sizes = [(n, set(a[:n]), set(b[:n])) for n in range(1, len(a))]
    return [OtherSet(n, sorted(x - y), sorted(y - x)) for n, x, y in sizes if x != y]


def _changed(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each block of another tier in B: the KL differs, or the threshold does."""
    sides: list[Mapping[int, float]] = [{r.block: r.a for r in rows}, {r.block: r.b for r in rows}]
    if any(sum(kl.values()) < 0 for kl in sides):  # of a cumulative profile's differences
        return []
    (in_a, in_b), taus = [tiers(kl) for kl in sides], [thresholds(kl, None, None) for kl in sides]
    found = []
    for r in rows:
        if in_a[r.block] == in_b[r.block]:
            continue
        if r.apart is None:
            why = ""
        elif r.beyond:
            why = f"; {abs(r.apart):.1f} standard errors apart"
        else:
            why = "; within 2 standard errors of each other, so the thresholds, shares of the mean KL, decide"
        found.append(
            f"block {r.block}: {in_a[r.block]} in A, {in_b[r.block]} in B: KL {measured(r.a, r.a_stderr)} against "
            f"{measured(r.b, r.b_stderr)}; thresholds {_and(taus[0])} in A, {_and(taus[1])} in B{why}"
        )
    return found


def measured(kl: float, stderr: float | None) -> str:
    """Return '0.0123 ± 0.0005' to three digits, for a sentence."""
    return f"{kl:.3g}" + ("" if stderr is None else f" ± {stderr:.1g}")


def _and(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3g} and {pair[1]:.3g}"
