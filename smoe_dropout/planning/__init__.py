"""Planned k: the number of active experts of each MoE layer under a budget, chosen by losses and times measured on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import integer, number
from smoe_dropout.options import require
from smoe_dropout.planning.planned import FLOPS, MILLISECONDS, Plan, sizes_of
from smoe_dropout.planning.search import between, search
from smoe_dropout.planning.trial import trial

__all__ = ["Plan", "plan"]


@torch.no_grad()
def plan(
    model: nn.Module,
    passes: Iterable[Callable[[], object] | tuple[Callable[[], object], Tensor | None]],
    *,
    flops: float | None = None,
    milliseconds: float | None = None,
    repeats: int = 5,
) -> Plan:
    """Choose k for each MoE layer so that the loss on calibration data is small within a budget.

    passes: as for `calibrate`, functions that run the model once, or pairs of one and a bool mask of the positions that count; here each
        returns its mean loss, a number or a tensor with one value. Passes weigh by the positions of their masks, or alike if none has one.
        They are run many times in the same order, so the first one must not continue what the last one left.
    flops: the budget as a fraction of the FLOPs that all experts cost on these passes, so that k of E experts in every layer cost k/E;
        routing, which costs the same at every k, does not count. Layers may differ in experts, widths and tokens.
    milliseconds: the budget as the mean time of a pass, instead. The time of each layer at each k is measured where the model runs, by its
        own backend: the median of `repeats` interleaved rounds. If torch has one thread on a CPU, that is the time in which it computes,
        so that other processes do not disturb it.

    The increase in loss when one layer alone departs from the largest uniform k within the budget is measured for every layer and k (for
    16 of them where a layer has more experts). Dynamic programming (a multiple-choice knapsack over at most U = 10,000 units of cost)
    finds the plan with the smallest sum of these increases, in O(L E U) for L layers of E experts. Increases do not add up exactly, so that
    plan and then its neighbours, with a k more in one layer and fewer in another, are measured, 8 at a time, as long as the loss decreases
    and at most 8 times. Of everything measured within the budget the best is returned. Every uniform k is among it, and
    between two of them the plans that have the larger one in the first or last layers; so on the calibration data a plan is never worse
    than the uniform k of the same cost. The passes are run at most L (E - 1) + E + 80 times,
    and (E + 2) `repeats` times more for a time.

    The model runs in evaluation mode; modes, k and random state are restored. Raises ConfigError for a budget that k = 1 exceeds, for
    passes that are empty, return no finite loss or do not reach every MoE layer, and for routers that draw experts in evaluation.
    """
    require((flops is None) != (milliseconds is None), "plan takes one budget: flops=0.5, a fraction of those at k = E, or milliseconds=20")
    unit, given = (FLOPS, flops) if milliseconds is None else (MILLISECONDS, milliseconds)
    budget, repeats = number(unit, given), integer("repeats", repeats)
    require(unit == MILLISECONDS or budget <= 1, f"flops = {budget:g} is a fraction of the experts' FLOPs at k = E: give at most 1")
    with trial(model, passes) as runs:
        runs.check()
        costs = runs.flops() if unit == FLOPS else runs.nanoseconds(repeats)
        limit = math.floor(budget * costs.whole * (1 + 1e-9))
        uniform = [ks for ks in runs.uniform if costs.of(ks) <= limit]
        least = min(map(costs.of, runs.uniform)) / costs.whole
        require(bool(uniform), f"{unit} = {budget:g} is less than k = 1 in every layer costs: give at least {least:.4g}")
        alike = uniform[-1]
        best = search(runs.loss, [alike, *uniform, *between(alike, costs, limit)], costs, limit)
        measured = runs.assigned([best, alike], costs) if unit == FLOPS else runs.milliseconds([best, alike], repeats)
        return Plan(
            k={name: k for (name, _), k in zip(runs.layers, best, strict=True)},
            sizes=sizes_of(runs.layers),
            unit=unit,
            budget=budget,
            predicted=costs.of(best) / costs.whole,
            measured=measured[0],
            loss=runs.loss(best),
            uniform=max(alike),
            uniform_measured=measured[1],
            uniform_loss=runs.loss(alike),
            evaluations=runs.evaluations,
        )
