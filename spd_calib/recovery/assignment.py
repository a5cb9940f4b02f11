"""Giving n things to R ranks, the same number to each, at least total cost: exact, and fast for few ranks.

This is a transportation problem with R sinks, so no n x n matrix is needed. It is solved by successive shortest paths:
everything begins at its cheapest rank, and what is too much at a rank is then sent along the cheapest path between
ranks, each step of which moves the thing that loses least. The result is optimal, since the start has no negative cycle
and shortest paths bring none in.
"""

import heapq
from itertools import pairwise

import numpy as np


def balanced(cost: np.ndarray) -> np.ndarray:
    """Return the rank [n] of each thing, n / R at each rank, with the least total cost; `cost` is [R, n]."""
    ranks, n = cost.shape
    if n % ranks:
        raise ValueError(f"{n} things cannot be given to {ranks} ranks evenly")
    c = np.ascontiguousarray(cost.T, dtype=np.float64)
    owner = c.argmin(1)
    capacity, load = n // ranks, np.bincount(owner, minlength=ranks)
    # heaps[r][s]: (what moving from r to s adds, thing), among things at r; entries go stale as things move
    heaps: list[list[list[tuple[float, int]]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]
    for r in range(ranks):
        things = np.flatnonzero(owner == r)
        for s in range(ranks):
            if s != r:
                heaps[r][s] = list(zip((c[things, s] - c[things, r]).tolist(), things.tolist(), strict=True))
                heapq.heapify(heaps[r][s])
    while (load > capacity).any():
        path = _cheapest_path(heaps, owner, load, capacity)
        moves = [(heaps[r][s][0][1], s) for r, s in pairwise(path)]
        for thing, s in moves:
            owner[thing] = s
            for t in range(ranks):
                if t != s:
                    heapq.heappush(heaps[s][t], (float(c[thing, t] - c[thing, s]), thing))
        load[path[0]] -= 1
        load[path[-1]] += 1
    return owner


def _cheapest_path(heaps: list, owner: np.ndarray, load: np.ndarray, capacity: int) -> list[int]:
    """Return the cheapest path over ranks, from one with too much to one with too little.

    By Bellman and Ford's algorithm, since steps may cost less than 0.
    """
    ranks = len(load)
    edge = np.full((ranks, ranks), np.inf)
    for r in range(ranks):
        for s in range(ranks):
            heap = heaps[r][s]
            while heap and owner[heap[0][1]] != r:
                heapq.heappop(heap)
            if heap:
                edge[r, s] = heap[0][0]
    distance = np.where(load > capacity, 0.0, np.inf)
    before = np.full(ranks, -1)
    for _ in range(ranks - 1):
        through = distance[:, None] + edge
        best, shortest = through.argmin(0), through.min(0)
        better = shortest < distance - 1e-15 * np.abs(np.where(np.isfinite(distance), distance, 0.0))
        if not better.any():
            break
        distance, before = np.where(better, shortest, distance), np.where(better, best, before)
    end = int(np.where(load < capacity, distance, np.inf).argmin())
    path = [end]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
        if len(path) > ranks:  # a cycle of rounding errors; a direct step is as good
            break
    path.reverse()
    return path


def order_of(owner: np.ndarray, ranks: int) -> np.ndarray:
    """Return the things in the order that gives each rank a part: rank 0 the first n / R, and so on.

    The things of one rank stay in their old order.
    """
    return np.concatenate([np.flatnonzero(owner == r) for r in range(ranks)])
