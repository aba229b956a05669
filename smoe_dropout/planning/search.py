"""Search for k of each layer: dynamic programming over the losses of single layers, then measured neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

OPTIONS = 16  # numbers of experts tried in a layer that has more
UNITS = 10_000  # of the dynamic programming, at most
NEIGHBOURS, ROUNDS = 8, 8  # of the search after it: plans measured in a round, and rounds

Ks = tuple[int, ...]  # k of every MoE layer, in the model's order


class Costs(NamedTuple):
    """Cost of every layer at each k from 1 on, in FLOPs of the calibration data or nanoseconds of a pass. rest: of what no k changes.

    whole: what cost 1 in the unit of the budget.
    """

    by_layer: list[list[int]]
    rest: int
    whole: float

    def of(self, ks: Ks) -> int:
        """Cost of a pass at these ks."""
        return self.rest + sum(costs[k - 1] for costs, k in zip(self.by_layer, ks, strict=True))


def least_loss(losses: list[list[float]], costs: list[list[int]], limit: int) -> list[int] | None:
    """The option of each layer so that the sum of losses is the smallest whose costs sum to at most `limit`; None if there is none.

    losses[i][j], costs[i][j]: of layer i's option j. Dynamic programming over the limit; exact, for whole costs.
    """
    best_U = torch.zeros(limit + 1, dtype=torch.float64)  # smallest loss of the layers so far that costs at most U
    chosen_LU = []
    for layer_losses, layer_costs in zip(losses, costs, strict=True):
        options_OU = torch.stack(
            [
                F.pad(best_U[: max(limit + 1 - cost, 0)] + loss, (min(cost, limit + 1), 0), value=math.inf)
                for loss, cost in zip(layer_losses, layer_costs, strict=True)
            ]
        )
        best_U, chosen_U = options_OU.min(0)
        chosen_LU.append(chosen_U)
    if best_U[-1] == math.inf:
        return None
    found, left = [], limit
    for chosen_U, layer_costs in zip(reversed(chosen_LU), reversed(costs), strict=True):
        found.append(int(chosen_U[left]))
        left -= layer_costs[found[-1]]
    return found[::-1]


def search(loss: Callable[[Ks], float], starts: list[Ks], costs: Costs, limit: int) -> Ks:
    """The plan with the smallest loss of those measured, all within the limit.

    loss: of a plan. starts: plans within the limit, which are measured; losses of single layers are measured around the first of them.
    """
    base = starts[0]
    measured = {ks: loss(ks) for ks in starts}
    options = [_options(len(layer), k) for layer, k in zip(costs.by_layer, base, strict=True)]
    increase = [{k: loss(_with(base, place, k)) - measured[base] for k in ks} for place, ks in enumerate(options)]
    units = _in_units([[costs.by_layer[place][k - 1] for k in ks] for place, ks in enumerate(options)], limit - costs.rest)
    chosen = least_loss([list(layer.values()) for layer in increase], *units)
    if chosen is not None:
        ks = tuple(own[option] for own, option in zip(options, chosen, strict=True))
        measured[ks] = loss(ks)

    def expected(ks: Ks) -> float:
        return sum(layer[min(layer, key=lambda option: abs(option - k))] for layer, k in zip(increase, ks, strict=True))

    best = min(measured, key=measured.get)
    for _ in range(ROUNDS):
        near = [ks for ks in neighbours(best, options, costs, limit) if ks not in measured]
        measured |= {ks: loss(ks) for ks in sorted(near, key=expected)[:NEIGHBOURS]}
        if (found := min(measured, key=measured.get)) == best:
            break
        best = found
    return best


def neighbours(ks: Ks, options: list[list[int]], costs: Costs, limit: int) -> list[Ks]:
    """Plans within the limit with a larger k in one layer, paid for in another where necessary, or just a smaller k in one."""
    found = []
    for place, own in enumerate(options):
        found += [_with(ks, place, k) for k in reversed(own) if k < ks[place]][:1]
        for more in [_with(ks, place, k) for k in own if k > ks[place]][:1]:
            if costs.of(more) <= limit:
                found.append(more)
                continue
            for other, theirs in enumerate(options):
                paid = [_with(more, other, k) for k in reversed(theirs) if other != place and k < ks[other]]
                found += [plan for plan in paid if costs.of(plan) <= limit][:1]
    return [plan for plan in dict.fromkeys(found) if costs.of(plan) <= limit]


def between(uniform: Ks, costs: Costs, limit: int) -> list[Ks]:
    """Plans between a uniform k and the next: one more in as many of the first layers, or of the last, as the limit allows."""
    found = []
    for order in (range(len(uniform)), reversed(range(len(uniform)))):
        ks = uniform
        for place in order:
            more = _with(ks, place, min(max(uniform) + 1, len(costs.by_layer[place])))
            if costs.of(more) > limit:
                break
            ks = more
        found.append(ks)
    return found


def _options(experts: int, base: int) -> list[int]:
    """Numbers of experts to try in a layer."""
    if experts <= OPTIONS:
        return list(range(1, experts + 1))
    spread = {round(1 + place * (experts - 1) / (OPTIONS - 1)) for place in range(OPTIONS)}
    return sorted(spread | {base, min(base + 1, experts)})


def _in_units(costs: list[list[int]], limit: int) -> tuple[list[list[int]], int]:
    """Costs and limit beyond the least cost of each layer, in units of which the limit has at most `UNITS`; costs are rounded up."""
    least = [min(layer) for layer in costs]
    beyond, limit = [[cost - low for cost in layer] for layer, low in zip(costs, least, strict=True)], limit - sum(least)
    unit = max(math.gcd(*(cost for layer in beyond for cost in layer)), 1)
    if limit // unit > UNITS:
        unit = -(-limit // UNITS)
    return [[-(-cost // unit) for cost in layer] for layer in beyond], max(limit // unit, 0)


def _with(ks: Ks, place: int, k: int) -> Ks:
    return (*ks[:place], k, *ks[place + 1 :])
