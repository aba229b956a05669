"""M-SMoE: merging of experts by routing similarity (arXiv 2310.01334, section 3.2).

The most used experts are dominant. Every other expert joins the dominant expert of its layer with the most similar router logits and is
merged into it, with aligned hidden units, weighted by usage.

The paper keeps all router rows and maps them to merged experts. Here the router shrinks too, and a merged expert gets the row of its
dominant expert: a mean of different rows would be shorter than each of them, so a large group would rarely be chosen.
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
    """Groups around `keep` dominant experts per layer on average and at least one in each, or `keep` in every layer with `by_layer`.

    Raises ValueError if a dominant expert received no tokens.
    """
    chosen = most_used([calibration.usage_E for calibration in calibrations], keep, bool(options.get("by_layer")))
    return [grouped(leaders, calibration) for leaders, calibration in zip(chosen, calibrations, strict=True)]


def most_used(usages: Sequence[Tensor], keep: int, by_layer: bool) -> list[list[int]]:
    """Indices of the most used experts of every layer: `keep` per layer on average, or in every layer with `by_layer`.

    Raises ValueError if one of them received no tokens, or there are not that many experts.
    """
    if not by_layer and keep * len(usages) > (total := sum(map(len, usages))):
        raise ValueError(f"keep = {keep} on average over {len(usages)} layers exceeds the {total} experts of the model: keep fewer")
    chosen = [_most_used(usage_E, keep) for usage_E in usages] if by_layer else dominant(usages, keep * len(usages))
    for index, (leaders, usage_E) in enumerate(zip(chosen, usages, strict=True)):
        if unreached := [leader for leader in leaders if usage_E[leader] == 0]:
            raise ValueError(
                f"expert {unreached[0]} of MoE layer {index} would be kept, but received no tokens of the calibration data: "
                "use more data, a larger k, or keep fewer"
            )
    return chosen


def dominant(usages: Sequence[Tensor], count: int) -> list[list[int]]:
    """Indices of the most used experts of every layer: `count` over all layers together, at least one in each."""
    first = [_most_used(usage_E, 1) for usage_E in usages]
    others = [(-share, layer, expert) for layer, usage_E in enumerate(usages) for expert, share in enumerate(usage_E.tolist())]
    others = sorted(entry for entry in others if entry[2] not in first[entry[1]])[: count - len(usages)]
    return [sorted(first[layer] + [expert for _, of, expert in others if of == layer]) for layer in range(len(usages))]


def grouped(leaders: Sequence[int], calibration: LayerCalibration) -> list[Group]:
    """Groups of a layer: every expert joins the leader with the most similar router logits."""
    nearest_E = torch.as_tensor(leaders)[similarity(calibration.logits_SE)[:, leaders].argmax(1)]
    nearest_E[leaders] = torch.as_tensor(leaders)
    return [Group(tuple((nearest_E == leader).nonzero().flatten().tolist()), leader) for leader in leaders]


def similarity(logits_SE: Tensor) -> Tensor:
    """Cosine similarity of experts' router logits over the sample [E, E]."""
    columns_SE = F.normalize(logits_SE.double(), dim=0)
    return columns_SE.T @ columns_SE


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration) -> Expert:
    """Mean of the members, aligned to their leader and weighted by usage."""
    leader = expert_of(layer.experts, group.leader)
    members = [leader if index == group.leader else aligned(expert_of(layer.experts, index), leader) for index in group.members]
    usage = calibration.usage_E[list(group.members)]
    return mean(members, usage / usage.sum())


def mean(members: Sequence[Expert], shares: Tensor) -> Expert:
    """Mean weighted by `shares`, which sum to 1; a single expert is returned unchanged."""
    if len(members) == 1:
        return members[0]
    return Expert(*(torch.tensordot(shares.to(tensors[0]), torch.stack(tensors), 1) for tensors in zip(*members, strict=True)))


def _most_used(usage_E: Tensor, count: int) -> list[int]:
    return sorted(usage_E.sort(descending=True, stable=True).indices[:count].tolist())
