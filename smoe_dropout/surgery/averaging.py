"""Baseline for merging: the same groups, with their experts averaged without alignment or weights."""

import torch

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of
from smoe_dropout.surgery.merging import NEEDS, groups, mean
from smoe_dropout.surgery.merging import OPTIONS as OF_MERGING

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

OPTIONS = {name: default for name, default in OF_MERGING.items() if name != "align"}


def combine(layer: MoELayer, group: Group, calibration: LayerCalibration) -> Expert:
    """Unweighted mean of the members."""
    count = len(group.members)
    return mean([expert_of(layer.experts, index) for index in group.members], torch.full((count,), 1 / count, dtype=torch.float64))
