"""Keep the best experts of every layer unchanged and drop the others, scored on calibration data or by the router alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.options import require
from smoe_dropout.registry import unknown
from smoe_dropout.routers import LinearRouter
from smoe_dropout.surgery.budgets import EQUAL, best, kept
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.dropping import combine
from smoe_dropout.surgery.groups import Group

__all__ = ["NEEDS", "OPTIONS", "combine", "groups"]

NEEDS = False  # depends on the score
OPTIONS = {"score": "usage", **EQUAL}

# score of every expert [E], its share of the layer's total. The norm of router rows indicates large logits; rows of a frozen router keep
# their initial norms
SCORES: dict[str, Callable[[MoELayer, LayerCalibration | None], Tensor]] = {
    "usage": lambda layer, calibration: calibration.usage_E,
    "gate_weight": lambda layer, calibration: calibration.weight_E,
    "router_norm": lambda layer, calibration: F.normalize(row_norms(layer), 1, 0),
}


def row_norms(layer: MoELayer) -> Tensor:
    """Norms of the router's rows for the experts that are not shared. ConfigError for a router that is not linear."""
    linear = isinstance(layer.router, LinearRouter)
    require(linear, f"score 'router_norm' is the norm of a linear router's rows, but router {layer.config.router!r} has none: use usage")
    return layer.router.weight.detach()[layer.config.shared_experts :].norm(dim=1).cpu()


def groups(
    layers: Sequence[MoELayer], calibrations: Sequence[LayerCalibration | None], keep: int, options: Mapping[str, Any]
) -> list[list[Group]]:
    """The `keep` experts of every layer with the highest option `score`, or `keep` on average with option `pooled`.

    Raises ConfigError for an unknown score or a missing calibration, ValueError if an expert to keep received no tokens.
    """
    score = str(options["score"])
    require(score in SCORES, unknown("score", score, SCORES))
    require(score == "router_norm" or None not in calibrations, f"score {score!r} needs a calibration: calibrate(model, passes) makes one")
    scores = [SCORES[score](layer, calibration) for layer, calibration in zip(layers, calibrations, strict=True)]
    return kept(scores, best(scores, keep, options))
