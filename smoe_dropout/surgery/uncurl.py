"""UNCURL's pruning (arXiv 2409.01483): experts of every layer are clustered by their router logits on a task's data.

Each cluster becomes one expert, aligned and weighted by usage, with the router row of its most used member.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.clustering import spectral_clusters
from smoe_dropout.surgery.groups import Group
from smoe_dropout.surgery.merging import NEEDS, combine, similarity

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

OPTIONS = {"seed": 0}


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """`keep` clusters in every layer; option `seed` is that of k-means. ValueError if no expert of a cluster received any tokens."""
    return [_clustered(index, calibration, keep, options["seed"]) for index, calibration in enumerate(calibrations)]


def _clustered(index: int, calibration: LayerCalibration, keep: int, seed: int) -> list[Group]:
    found = []
    for members in spectral_clusters(similarity(calibration.logits_SE).clamp(min=0), min(keep, len(calibration.usage_E)), seed):
        usage = calibration.usage_E[list(members)]
        if usage.sum() == 0:
            names = ", ".join(map(str, members))
            raise ValueError(
                f"the experts {names} of MoE layer {index} would be merged by usage, but received no tokens of the calibration data: "
                "use more data, a larger k, or keep fewer"
            )
        found.append(Group(members, members[int(usage.argmax())]))
    return found
