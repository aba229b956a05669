"""UNCURL's pruning (arXiv 2409.01483): experts of every layer are clustered by their router logits on a task's data.

Each cluster becomes one expert, aligned and weighted by usage, with the router row of its most used member.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.budgets import EQUAL, best, led
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.clustering import spectral_clusters
from smoe_dropout.surgery.groups import Group
from smoe_dropout.surgery.merging import NEEDS, combine, similarity

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

OPTIONS = {"seed": 0, **EQUAL}


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """`keep` clusters in every layer, or on average with option `pooled`, then by usage as in `merging`; `seed` is that of k-means.

    Raises ValueError if no expert of a cluster received any tokens.
    """
    counts = map(len, best([calibration.usage_E for calibration in calibrations], keep, options))
    found = []
    for index, (calibration, count) in enumerate(zip(calibrations, counts, strict=True)):
        alike_EE = similarity(calibration.logits_SE).clamp(min=0)
        found.append(led(spectral_clusters(alike_EE, count, options["seed"]), calibration.usage_E, index))
    return found
