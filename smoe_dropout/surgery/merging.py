"""M-SMoE: merging of experts by routing similarity (arXiv 2310.01334, section 3.2).

The most used experts are dominant. Every other expert joins the dominant expert of its layer with the most similar router logits, by the
cosine over all calibration tokens, and is merged into it, weighted by usage. Hidden units of all experts of a layer are aligned to its
expert 0, as in the authors' code (UNITES-Lab/MC-SMoE, 4a195b1); align="leader" aligns those of a group to its dominant expert, and
compare="sample" takes the cosine over the calibration's sample of tokens.

The paper keeps all router rows and maps them to merged experts. Here the router shrinks too, and a merged expert gets the row of its
dominant expert: a mean of different rows would be shorter than each of them, so a large group would rarely be chosen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.options import require
from smoe_dropout.registry import unknown
from smoe_dropout.surgery.alignment import aligned
from smoe_dropout.surgery.budgets import AVERAGING, best, reached
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = True
COMPARE, ALIGN = ("all", "sample"), ("first", "leader")
OPTIONS = {**AVERAGING, "compare": COMPARE[0], "align": ALIGN[0]}


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """Groups around `keep` dominant experts per layer on average and at least one in each, or `keep` in every layer with `by_layer`.

    Raises ValueError if a dominant expert received no tokens, ConfigError for an unknown option's value and a calibration without products.
    """
    for name, known in (("compare", COMPARE), ("align", ALIGN)):
        require((value := options.get(name, known[0])) in known, unknown(f"value of option {name}", str(value), list(known)))
    sampled, reference = options["compare"] == "sample", 0 if options.get("align") == "first" else None
    usages = [calibration.usage_E for calibration in calibrations]
    chosen = reached(usages, best(usages, keep, options))
    return [
        grouped(leaders, similarity(its.logits_SE) if sampled else similarity_of_all(its), reference)
        for leaders, its in zip(chosen, calibrations, strict=True)
    ]


def grouped(leaders: Sequence[int], alike_EE: Tensor, reference: int | None = None) -> list[Group]:
    """Groups of a layer: every expert joins the leader that is most alike."""
    nearest_E = torch.as_tensor(leaders)[alike_EE[:, leaders].argmax(1)]
    nearest_E[leaders] = torch.as_tensor(leaders)
    return [Group(tuple((nearest_E == leader).nonzero().flatten().tolist()), leader, reference) for leader in leaders]


def similarity(logits_SE: Tensor) -> Tensor:
    """Cosine similarity of experts' router logits over the sample [E, E]."""
    columns_SE = F.normalize(logits_SE.double(), dim=0)
    return columns_SE.T @ columns_SE


def similarity_of_all(calibration: LayerCalibration) -> Tensor:
    """Cosine similarity of experts' router logits over all tokens [E, E]. ConfigError for a calibration of an earlier version."""
    products_EE = calibration.products_EE
    require(products_EE is not None, "the calibration has no sums over all its tokens: make it again, or give compare='sample'")
    norms_E = products_EE.diagonal().sqrt().clamp(min=1e-12)
    return products_EE / (norms_E[:, None] * norms_E)


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration) -> Expert:
    """Mean of the members, aligned to the group's reference and weighted by usage; a single expert stays as it is."""
    if len(group.members) == 1:
        return expert_of(layer.experts, group.leader)
    place = group.leader if group.reference is None else group.reference
    reference = expert_of(layer.experts, place)
    members = [reference if index == place else aligned(expert_of(layer.experts, index), reference) for index in group.members]
    usage = calibration.usage_E[list(group.members)]
    return mean(members, usage / usage.sum())


def mean(members: Sequence[Expert], shares: Tensor) -> Expert:
    """Mean weighted by `shares`, which sum to 1; a single expert is returned unchanged."""
    if len(members) == 1:
        return members[0]
    return Expert(*(torch.tensordot(shares.to(tensors[0]), torch.stack(tensors), 1) for tensors in zip(*members, strict=True)))
