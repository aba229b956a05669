"""M-SMoE's merging of experts by how they are routed (arXiv 2310.01334, section 3.2).

The most used experts are dominant; every other one joins the dominant one of its layer whose router logits are most like its own, and is
merged into it, hidden units aligned, weighted by usage.

The paper keeps every router row and sends what it chooses to the merged expert. Here the model gets smaller: a merged expert has the row of
its dominant expert. A mean of rows that differ would be shorter than each of them, and a large group would then hardly be chosen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.alignment import aligned
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of

NEEDS = True
OPTIONS = {"by_layer": False}


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """`keep` experts a layer on average, at least one in each, or with the option `by_layer` as many in every one.

    ValueError where an expert that no token reached would be dominant.
    """
    chosen = most_used([calibration.usage_E for calibration in calibrations], keep, bool(options.get("by_layer")))
    return [joined(leaders, calibration) for leaders, calibration in zip(chosen, calibrations, strict=True)]


def most_used(usages: Sequence[Tensor], keep: int, by_layer: bool) -> list[list[int]]:
    """The experts [E] of every layer that are used most: `keep` a layer on average, or with `by_layer` in each. ValueError for one of them
    that no token reached, and for more than there are.
    """
    if not by_layer and keep * len(usages) > (there := sum(map(len, usages))):
        raise ValueError(f"keep = {keep} on average over {len(usages)} layers is more than the {there} experts there are: keep fewer")
    chosen = [_most_used(usage_E, keep) for usage_E in usages] if by_layer else dominant(usages, keep * len(usages))
    for index, (leaders, usage_E) in enumerate(zip(chosen, usages, strict=True)):
        if unreached := [leader for leader in leaders if usage_E[leader] == 0]:
            raise ValueError(
                f"no token of the calibration reached expert {unreached[0]} of MoE layer {index}, which would be kept: "
                "give more text, a larger k, or keep fewer"
            )
    return chosen


def dominant(usages: Sequence[Tensor], count: int) -> list[list[int]]:
    """The most used experts [E] of every layer, so many of all layers together and at least one of each."""
    first = [_most_used(usage_E, 1) for usage_E in usages]
    others = [(-share, layer, expert) for layer, usage_E in enumerate(usages) for expert, share in enumerate(usage_E.tolist())]
    others = sorted(entry for entry in others if entry[2] not in first[entry[1]])[: count - len(usages)]
    return [sorted(first[layer] + [expert for _, of, expert in others if of == layer]) for layer in range(len(usages))]


def joined(leaders: Sequence[int], calibration: LayerCalibration) -> list[Group]:
    """Every expert of a layer with the leader whose router logits are most like its own."""
    likest_E = torch.as_tensor(leaders)[similarity(calibration.logits_SE)[:, leaders].argmax(1)]
    likest_E[leaders] = torch.as_tensor(leaders)
    return [Group(tuple((likest_E == leader).nonzero().flatten().tolist()), leader) for leader in leaders]


def similarity(logits_SE: Tensor) -> Tensor:
    """Cosine of every two experts' router logits over the sample [E, E]."""
    columns_SE = F.normalize(logits_SE.double(), dim=0)
    return columns_SE.T @ columns_SE


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration) -> Expert:
    """The members aligned to their leader, their mean weighted by usage."""
    leader = expert_of(layer.experts, group.leader)
    members = [leader if index == group.leader else aligned(expert_of(layer.experts, index), leader) for index in group.members]
    usage = calibration.usage_E[list(group.members)]
    return mean(members, usage / usage.sum())


def mean(members: Sequence[Expert], shares: Tensor) -> Expert:
    """Weighted by shares that sum to 1; of one expert that expert itself, bit for bit."""
    if len(members) == 1:
        return members[0]
    return Expert(*(torch.tensordot(shares.to(tensors[0]), torch.stack(tensors), 1) for tensors in zip(*members, strict=True)))


def _most_used(usage_E: Tensor, count: int) -> list[int]:
    return sorted(usage_E.sort(descending=True, stable=True).indices[:count].tolist())
