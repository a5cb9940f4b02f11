"""Deciding which rank gets which heads. The dense function stays the same; what a rank misses does not.

KV groups (or, with more ranks than KV heads, the query heads of one) are scattered so that alike heads part, after the
paper; or placed by a search on what the ranks miss. Whichever measures better is kept.
"""

import numpy as np
import torch
from torch import Tensor

from spd_calib.models.architecture import HeadCounts

from .assignment import order_of
from .moments import Moments, o_matrix
from .permute import entries
from .student import Student

STARTS = 8  # of a search: the heads as they are, and random ones


def head_orders(student: Student, m: Moments, *, seed: int = 0) -> dict[str, Tensor]:
    """Return the orders of the query heads [heads] to choose from, by name; `m` are the moments of their outputs.

    As they are, the paper's (alike heads scattered), and by a search; the first alone where nothing can be placed.
    """
    counts, ranks = student.counts, student.block.comm.size
    orders = {"as it is": torch.arange(counts.heads)}
    units, cells = placeable_units(counts, ranks)
    if all(cell_count == len(members) or cell_count == 1 for members, cell_count in cells):
        return orders  # one unit a rank, or one rank: nothing to place
    gram, alike = _gram(units, m, o_matrix(student), counts.head_dim)
    generator = np.random.default_rng(seed)
    orders["scattered"] = _order(units, cells, alike, generator=generator)  # least likeness among heads of one rank
    # E|a - partial|^2 summed over ranks = const - sum over ranks of (2 <partial, a> - |partial|^2): only pairs on
    # one rank count, so the least error has the least sum of products within ranks as well
    orders["searched"] = _order(units, cells, gram, generator=generator)
    return orders


def placeable_units(counts: HeadCounts, ranks: int) -> tuple[list[list[int]], list[tuple[list[int], int]]]:
    """Return the smallest sets of query heads that can be placed, and which of these units share how many ranks."""
    group = counts.heads // counts.kv_heads
    if ranks <= counts.kv_heads:
        units = [list(range(g * group, (g + 1) * group)) for g in range(counts.kv_heads)]
        return units, [(list(range(counts.kv_heads)), ranks)]
    units = [[h] for h in range(counts.heads)]
    share = ranks // counts.kv_heads
    return units, [(list(range(g * group, (g + 1) * group)), share) for g in range(counts.kv_heads)]


def _gram(units: list[list[int]], m: Moments, o: Tensor, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return E <h_i, h_j> of the units' contributions to the attention output (centred), and their correlation."""
    n = len(units)
    gram = torch.zeros(n, n, dtype=torch.float64)
    index = [entries(torch.tensor(u), head_dim) for u in units]
    for i in range(n):
        for j in range(i, n):
            c = m.covariance[index[i]][:, index[j]]
            gram[i, j] = gram[j, i] = torch.einsum("id,id->", o[index[i]], c @ o[index[j]]).cpu()
    scale = gram.diagonal().clamp(min=1e-30).sqrt()
    return gram.numpy(), (gram / scale / scale[:, None]).abs().numpy()


def _order(
    units: list[list[int]],
    cells: list[tuple[list[int], int]],
    affinity: np.ndarray,
    *,
    generator: np.random.Generator,
) -> Tensor:
    """Return the order of the heads with the least sum of `affinity` over pairs on one rank, by swaps from STARTS."""
    order: list[int] = []
    for members, ranks in cells:
        a = affinity[np.ix_(members, members)].copy()
        np.fill_diagonal(a, 0.0)
        found = [_swap_search(a, _start(len(members), ranks, generator if t else None)) for t in range(STARTS)]
        best = min(found, key=lambda owner: _within(a, owner))
        order += [members[i] for i in order_of(best, ranks)]
    return torch.tensor([head for unit in order for head in units[unit]])


def _start(n: int, ranks: int, generator: np.random.Generator | None) -> np.ndarray:
    """Return the rank [n] of each unit: as they are, or drawn."""
    owner = np.repeat(np.arange(ranks), n // ranks)
    return owner if generator is None else generator.permutation(owner)


def _within(a: np.ndarray, owner: np.ndarray) -> float:
    return float(a[owner[:, None] == owner].sum())


def _swap_search(a: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return `owner` after swaps of the two units that help most, until none helps."""
    n, owner = len(owner), owner.copy()
    while True:
        to = np.stack([a[:, owner == r].sum(1) for r in range(owner.max() + 1)], axis=1)  # [n, R]
        at = to[np.arange(n), owner]
        across = to[:, owner]  # across[i, j]: affinity of i with j's rank
        gain = at[:, None] + at - across - across.T + 2 * a
        gain[owner[:, None] == owner] = -np.inf
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-12 * max(abs(at).max(), 1e-30):
            return owner
        owner[[i, j]] = owner[[j, i]]
