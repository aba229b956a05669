"""Surgery on trained models: a model in, a smaller one out that has fewer experts and describes itself like any other.

    calibration = sd.calibrate(model, ((lambda: model(batch), None) for batch in batches), k=8)
    smaller, config = sd.operate(model, "merge", 8, calibration)

A method says which experts become one and how (`groups.py`); `registry.SURGERIES` has their names. What it leaves is compressed further by
`compression.py`.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import configure, get_top_k, moe_layers
from smoe_dropout.experts.compressed import CompressedExperts
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError, require
from smoe_dropout.registry import SURGERIES, load, unknown
from smoe_dropout.surgery.calibration import Calibration, calibrate, cuttable_layers
from smoe_dropout.surgery.groups import Expert

__all__ = ["Calibration", "calibrate", "operate"]


def operate(model: nn.Module, method: str, keep: int, calibration: Calibration | None, **options: object) -> tuple[nn.Module, SMoEConfig]:
    """A copy of the model with fewer experts, its routers cut to those that are left, and the configuration that it has; `moefy` makes such
    layers from it. All other tensors are those of the model, bit for bit, and the model stays as it is.

    method: a name in `registry.SURGERIES`; its file says how many experts `keep` leaves, and which options it has. calibration: of this
    model; None where the method needs none. k of the copy is that of the model, or all its experts if those are fewer.

    ConfigError for a dense or a compressed model, routers that cannot be cut, a `keep` or an option that cannot be, a calibration that is
    missing, or of another model, or that never reached an expert which would be left.
    """
    require(method in SURGERIES, unknown("method of surgery", method, SURGERIES))
    surgery, layers = load(SURGERIES, "method of surgery", method), [layer for _, layer in cuttable_layers(model)]
    _check(layers, keep)
    if foreign := sorted(options.keys() - surgery.OPTIONS.keys()):
        raise ConfigError(f"option {foreign[0]} means nothing to {method!r}; options: {', '.join(surgery.OPTIONS) or 'none'}")
    options = {**surgery.OPTIONS, **options}
    if calibration is not None:
        calibration.check_of(model)
    require(calibration is not None or not surgery.NEEDS, f"{method!r} needs a calibration: calibrate(model, passes) makes one")
    calibrations = [None] * len(layers) if calibration is None else calibration.layers
    groups = surgery.groups(layers, calibrations, keep, options)
    made = copy.deepcopy(model)
    for layer, smaller, its, calibrated in zip(layers, (layer for _, layer in moe_layers(made)), groups, calibrations, strict=True):
        _leave(smaller, [surgery.combine(layer, group, calibrated) for group in its], [group.leader for group in its])
    counts = tuple(map(len, groups))
    configure(
        made,
        num_experts=max(counts),
        experts_by_layer=counts if len(set(counts)) > 1 else None,
        top_k=min(get_top_k(model), max(counts)),
        d_expert=layers[0].experts.down.shape[1],
        expert_init="fresh",
    )
    return made, moe_layers(made)[0][1].config


def _check(layers: Sequence[MoELayer], keep: int) -> None:
    most = max(layer.num_experts for layer in layers)
    require(
        isinstance(keep, int) and not isinstance(keep, bool) and 1 <= keep <= most,
        f"keep = {keep!r} must be a whole number from 1 to the {most} experts of a layer",
    )
    require(
        not any(isinstance(layer.experts, CompressedExperts) for layer in layers),
        "the experts are compressed already: operate on the model as it was before, and compress last",
    )
    widths = sorted({layer.experts.down.shape[1] for layer in layers})
    require(len(widths) == 1, f"the layers have experts of different widths, {widths}, which no one d_expert describes")


@torch.no_grad()
def _leave(layer: MoELayer, experts: Sequence[Expert], leaders: Sequence[int]) -> None:
    """Leaves the layer these experts, chosen by the router rows of their leaders."""
    count, scale_before = len(experts), layer.output_scale
    layer.output_scale = 1.0 if layer.config.output_scale == "mean" else float(count)
    names, stacked = ("up", "bias_up", "down", "bias_down"), (torch.stack(tensors) for tensors in zip(*experts, strict=True))
    for name, tensor in zip(names, stacked, strict=True):
        if "down" in name and layer.output_scale != scale_before:
            tensor = tensor * (scale_before / layer.output_scale)  # what the experts sum to stays as large as it was
        setattr(layer.experts, name, nn.Parameter(tensor, getattr(layer.experts, name).requires_grad))
    for name, rows in list(layer.router.named_parameters(recurse=False)):
        setattr(layer.router, name, nn.Parameter(rows[list(leaders)], rows.requires_grad))
    layer.num_experts = layer.router.num_experts = count
    layer.top_k = min(layer.top_k, count)
