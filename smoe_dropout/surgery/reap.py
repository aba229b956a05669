"""REAP, router-weighted expert activation pruning (arXiv 2510.13999, section 4, eq. 9): the experts with the highest saliency are kept.

The saliency of expert j is S_j = 1/|X_j| sum_{x in X_j} g_j(x) ||f_j(x)||, the mean over the tokens X_j that chose it of its gate weight
times the norm of its output: what removing the expert changes where it is used, however often that is. The others are dropped with their
router rows, the same number in every layer as in the paper, or numbers that differ by layer with option `pooled`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from smoe_dropout.layer import MoELayer
from smoe_dropout.surgery.budgets import EQUAL as OPTIONS
from smoe_dropout.surgery.budgets import best, kept
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.dropping import combine
from smoe_dropout.surgery.groups import Group

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = True


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """The `keep` experts of every layer with the highest saliency, or `keep` on average.

    Raises ConfigError for a calibration without the experts' outputs, ValueError if one to keep received no tokens.
    """
    shares = [F.normalize(calibration.of_outputs("saliency_E"), 1, 0) for calibration in calibrations]
    return kept([calibration.usage_E for calibration in calibrations], best(shares, keep, options))
