"""HC-SMoE (arXiv 2410.08589, section 3.2): hierarchical clustering of experts by their outputs, whatever the router does.

Experts are represented by their mean output over all calibration tokens, o_j = 1/T sum_x E_j(x), also tokens that did not choose them
(section 3.2.1), and clustered by average linkage of Euclidean distances (3.2.2). A cluster becomes one expert, the mean of its members'
weights by usage (3.2.3), without alignment of hidden units.

The paper keeps all router rows, each leading to its cluster's expert. Here the router shrinks too, as in `merging`, and a merged expert
gets the row of its most used member. With option `pooled` layers keep different numbers of experts, as many as M-SMoE would by usage, as
in the authors' code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.budgets import EQUAL as OPTIONS
from smoe_dropout.surgery.budgets import best, led
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of
from smoe_dropout.surgery.merging import mean

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = True


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """`keep` clusters in every layer, or on average.

    Raises ConfigError for a calibration without the experts' outputs, ValueError if no expert of a cluster received any tokens.
    """
    counts = map(len, best([calibration.usage_E for calibration in calibrations], keep, options))
    return [
        led(clusters(calibration.of_outputs("outputs_ED"), count), calibration.usage_E, index)
        for index, (calibration, count) in enumerate(zip(calibrations, counts, strict=True))
    ]


def clusters(outputs_ED: Tensor, count: int) -> list[tuple[int, ...]]:
    """Partition of experts into `count` clusters by average linkage of Euclidean distances, in order of their first members."""
    if count >= len(outputs_ED):
        return [(expert,) for expert in range(len(outputs_ED))]
    labels = cut_tree(linkage(outputs_ED.numpy(), method="average", metric="euclidean"), n_clusters=count)[:, 0].tolist()
    return sorted(tuple(expert for expert, label in enumerate(labels) if label == cluster) for cluster in range(count))


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration) -> Expert:
    """Mean of the members, weighted by usage."""
    usage = calibration.usage_E[list(group.members)]
    return mean([expert_of(layer.experts, index) for index in group.members], usage / usage.sum())
