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
from smoe_dropout.surgery.budgets import AVERAGING as OPTIONS
from smoe_dropout.surgery.budgets import best, reached
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = True


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """Groups around `keep` dominant experts per layer on average and at least one in each, or `keep` in every layer with `by_layer`.

    Raises ValueError if a dominant expert received no tokens.
    """
    usages = [calibration.usage_E for calibration in calibrations]
    chosen = reached(usages, best(usages, keep, options))
    return [grouped(leaders, calibration) for leaders, calibration in zip(chosen, calibrations, strict=True)]


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
