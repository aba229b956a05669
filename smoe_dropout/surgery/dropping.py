"""Baseline for merging: the dominant experts are kept unchanged and the others dropped."""

from collections.abc import Mapping, Sequence
from typing import Any

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.budgets import AVERAGING as OPTIONS
from smoe_dropout.surgery.budgets import best, kept
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = True


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """The most used experts: `keep` per layer on average, or in every layer with option `by_layer`.

    Raises ValueError if one of them received no tokens.
    """
    usages = [calibration.usage_E for calibration in calibrations]
    return kept(usages, best(usages, keep, options))


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration | None) -> Expert:
    """The group's single member."""
    return expert_of(layer.experts, group.leader)
