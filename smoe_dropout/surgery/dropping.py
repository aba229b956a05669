"""The baseline of merging: of the experts that merging would keep nothing changes, and the others are dropped."""

from collections.abc import Mapping, Sequence
from typing import Any

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of
from smoe_dropout.surgery.merging import OPTIONS, most_used

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = True


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """The most used experts of all layers together, `keep` a layer on average, or with the option `by_layer` in each. ValueError for one of
    them that no token reached.
    """
    chosen = most_used([calibration.usage_E for calibration in calibrations], keep, options["by_layer"])
    return [[Group((expert,), expert) for expert in experts] for experts in chosen]


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration | None) -> Expert:
    """The one member."""
    return expert_of(layer.experts, group.leader)
