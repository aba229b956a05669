"""Budgets: how many experts every layer keeps, and which have the highest scores.

A budget is `keep` experts in every layer, or pooled: the experts of all layers are ranked together, `keep` per layer on average and at
least `at_least` in each, as M-SMoE does by usage (arXiv 2310.01334, section 3.2). Pooled scores are shares of their layer's total, as usage
is, so that a layer whose total lies with few experts keeps few, and layers with larger outputs are not preferred.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smoe_dropout.options import require
from smoe_dropout.surgery.groups import Group

AVERAGING = {"by_layer": False, "at_least": 1}  # options of a method with pooled budgets
EQUAL = {"pooled": False, "at_least": 1}  # options of a method with the same number of experts in every layer


def kept(scores: Sequence[Tensor], chosen: Sequence[list[int]]) -> list[list[Group]]:
    """Groups of the chosen experts of every layer, unchanged. ValueError as in `reached`."""
    return [[Group((expert,), expert) for expert in experts] for experts in reached(scores, chosen)]


def best(scores: Sequence[Tensor], keep: int, options: Mapping[str, Any]) -> list[list[int]]:
    """Indices of the experts with the highest scores of every layer, in order; a layer with fewer than its budget keeps all.

    scores: of the experts of every layer [E]. options: `AVERAGING` or `EQUAL`. Raises ConfigError for an `at_least` that is below 1, above
    `keep` or without effect, ValueError if pooled layers have fewer experts than are to be kept.
    """
    at_least, pooled = options["at_least"], not options["by_layer"] if "by_layer" in options else options["pooled"]
    require(1 <= at_least <= keep, f"at_least = {at_least} must be from 1 to keep = {keep}, the number of experts of a layer on average")
    require(pooled or at_least == 1, f"at_least = {at_least} has no effect with the same number of experts in every layer: leave it out")
    ranks = [scores_E.sort(descending=True, stable=True).indices.tolist() for scores_E in scores]
    budgets = [keep] * len(scores)
    if pooled:
        total = sum(map(len, scores))
        if keep * len(scores) > total:
            raise ValueError(f"keep = {keep} on average over {len(scores)} layers exceeds the {total} experts of the model: keep fewer")
        budgets = [min(at_least, len(rank)) for rank in ranks]
        others = [
            (-float(scores_E[expert]), layer, expert)
            for layer, (scores_E, rank) in enumerate(zip(scores, ranks, strict=True))
            for expert in rank[at_least:]
        ]
        for _, layer, _ in sorted(others)[: keep * len(scores) - sum(budgets)]:
            budgets[layer] += 1
    return [sorted(rank[:budget]) for rank, budget in zip(ranks, budgets, strict=True)]


def reached(scores: Sequence[Tensor], chosen: Sequence[list[int]]) -> Sequence[list[int]]:
    """The chosen experts. ValueError if one has score 0: it received no tokens."""
    for index, (experts, scores_E) in enumerate(zip(chosen, scores, strict=True)):
        if unreached := [expert for expert in experts if scores_E[expert] == 0]:
            raise ValueError(
                f"expert {unreached[0]} of MoE layer {index} would be kept, but received no tokens of the calibration data: "
                "use more data, a larger k, or keep fewer"
            )
    return chosen


def led(clusters: Sequence[Sequence[int]], usage_E: Tensor, layer: int) -> list[Group]:
    """Groups of one layer, each led by its most used expert. ValueError if no expert of a cluster received any tokens."""
    found = []
    for members in clusters:
        usage = usage_E[list(members)]
        if usage.sum() == 0:
            names = ", ".join(map(str, members))
            raise ValueError(
                f"the experts {names} of MoE layer {layer} would be merged by usage, but received no tokens of the calibration data: "
                "use more data, a larger k, or keep fewer"
            )
        found.append(Group(tuple(members), members[int(usage.argmax())]))
    return found
