"""Assignment of points to clusters of equal size at the least cost.

The problem is a transport from F points to a few clusters, so a shortest path among the clusters, not among the points, moves each surplus
point: exact, and far faster than `scipy.optimize.linear_sum_assignment` with a copy of the cluster for each of its places.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

PRICE_ROUNDS = 200


def balanced(cost_FC: Tensor) -> Tensor:
    """Cluster [F] of each point, F/C points in each, with the least sum of costs [F, C]. C must divide F."""
    costs = cost_FC.detach().cpu().double().numpy()
    F, C = costs.shape
    size, prices = F // C, _prices(costs)
    cluster = (costs + prices).argmin(1)  # the cheapest assignment with clusters of these sizes, so that no cycle of moves is a gain
    counts = np.bincount(cluster, minlength=C)
    extra, mover = np.full((C, C), np.inf), np.zeros((C, C), int)  # the cheapest move from one cluster to another, and whose it is

    def look(c: int) -> None:
        members = np.flatnonzero(cluster == c)
        if len(members):
            differences = costs[members] - costs[members, c, None]
            best = differences.argmin(0)
            extra[c], mover[c] = differences[best, range(C)], members[best]
        extra[c, c if len(members) else slice(None)] = np.inf

    for c in range(C):
        look(c)
    while (counts > size).any():
        path = _shortest(extra, counts > size, counts < size)
        moves = [(mover[a, b], b) for a, b in pairwise(path)]
        for point, to in moves:
            cluster[point] = to
        counts[path[0]] -= 1
        counts[path[-1]] += 1
        for c in path:
            look(c)
    return torch.from_numpy(cluster).to(cost_FC.device)


def _prices(costs: np.ndarray) -> np.ndarray:
    """Prices of the clusters [C] at which points choose clusters of nearly equal size, which leaves few moves."""
    F, C = costs.shape
    prices, best, least = np.zeros(C), np.zeros(C), np.inf
    step = (costs - costs.min(1, keepdims=True)).mean() or 1.0
    for _ in range(PRICE_ROUNDS):
        surplus = np.bincount((costs + prices).argmin(1), minlength=C) * C / F - 1
        if (total := np.abs(surplus).sum()) < least:
            best, least = prices.copy(), total
        if not total:
            break
        prices += step * surplus
        step *= 0.97
    return best


def _shortest(extra: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> list[int]:
    """Cheapest path from one of the sources to one of the targets (Bellman and Ford)."""
    distance, before = np.where(sources, 0.0, np.inf), np.full(len(extra), -1)
    for _ in range(len(extra) - 1):
        through = distance[:, None] + extra
        best = through.argmin(0)
        reached = through[best, range(len(extra))]
        nearer = reached < distance - 1e-12 * np.abs(reached).clip(1e-300)
        if not nearer.any():
            break
        distance[nearer], before[nearer] = reached[nearer], best[nearer]
    path = [int(np.where(targets, distance, np.inf).argmin())]
    while not sources[path[-1]] or before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]
