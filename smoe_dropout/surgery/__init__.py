"""Surgery: reduces the experts of a trained model, giving a smaller model with its own configuration.

    calibration = sd.calibrate(model, ((lambda: model(batch), None) for batch in batches), k=8)
    smaller, config = sd.operate(model, "merge", 8, calibration)

A method of `registry.SURGERIES` decides which experts are combined and how; `groups.py` defines its interface. `compression.py` compresses
the remaining experts.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from smoe_dropout.arguments import SEEDS, boolean, integer, require_weights, shown
from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import configure, moe_layers, only_conversion
from smoe_dropout.experts.compressed import CompressedExperts
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError, require
from smoe_dropout.registry import SURGERIES, load, unknown
from smoe_dropout.surgery.calibration import Calibration, calibrate, cuttable_layers, require_finite
from smoe_dropout.surgery.groups import Expert, Group, with_shared

__all__ = ["Calibration", "calibrate", "operate"]


def operate(model: nn.Module, method: str, keep: int, calibration: Calibration | None, **options: object) -> tuple[nn.Module, SMoEConfig]:
    """Copy of the model with fewer experts and routers reduced accordingly, and its configuration, from which `moefy` builds such layers.

    All other tensors are bit-identical to the model's, and the model is not changed. k of the copy is what `set_top_k` has set for the
    model, in every layer at most its number of experts.

    method: a name in `registry.SURGERIES`. keep: number of experts to keep, shared ones among them; see the method's file. calibration: of
    this model; None if the method needs none. options: of the method.

    Raises ConfigError for a dense or compressed model, a router that cannot be reduced, an invalid `keep` or option, and a missing
    calibration or one of another model; ValueError if an expert to keep received no tokens.
    """
    require(isinstance(method, str) and method in SURGERIES, unknown("method of surgery", str(method), SURGERIES))
    surgery, layers = load(SURGERIES, "method of surgery", method), [layer for _, layer in cuttable_layers(model)]
    only_conversion(model)
    require_weights(model)
    keep = _checked(layers, keep)
    if foreign := sorted(options.keys() - surgery.OPTIONS.keys()):
        raise ConfigError(f"unknown option {foreign[0]} of {method!r}; options: {', '.join(surgery.OPTIONS) or 'none'}")
    options = {name: _option(name, options.get(name, default), type(default)) for name, default in surgery.OPTIONS.items()}
    if calibration is not None:
        require(isinstance(calibration, Calibration), f"calibration is a {type(calibration).__name__}: calibrate(model, passes) makes one")
        calibration.check_of(model)
    require(calibration is not None or not surgery.NEEDS, f"{method!r} needs a calibration: calibrate(model, passes) makes one")
    calibrations = [None] * len(layers) if calibration is None else calibration.layers
    shared = layers[0].config.shared_experts
    routed = [calibrated and calibrated.without(shared) for calibrated in calibrations]
    groups = [with_shared(its, shared) for its in surgery.groups(layers, routed, keep - shared, options)]
    made = copy.deepcopy(model)
    for layer, smaller, its, calibrated in zip(layers, (layer for _, layer in moe_layers(made)), groups, calibrations, strict=True):
        _replace(smaller, [surgery.combine(layer, group, calibrated) for group in its], its)
    counts = tuple(map(len, groups))
    configure(
        made,
        num_experts=max(counts),
        experts_by_layer=counts if len(set(counts)) > 1 else None,
        d_expert=layers[0].experts.down.shape[1],
        expert_init="fresh",
        cut="contiguous",
    )
    return made, moe_layers(made)[0][1].config


def _option(name: str, value: object, kind: type) -> object:
    """An option's value as its default's type. ConfigError for another."""
    if kind is bool:
        return boolean(name, value)
    if kind is int:
        return integer(name, value, *SEEDS)
    require(isinstance(value, kind), f"{name} = {shown(value)} must be a {kind.__name__}")
    return value


def _checked(layers: Sequence[MoELayer], keep: int) -> int:
    most, shared = max(layer.num_experts for layer in layers), layers[0].config.shared_experts
    try:
        keep = integer("keep", keep, 1, most)
    except ConfigError:
        raise ConfigError(f"keep = {shown(keep)} must be a whole number from 1 to the {most} experts of a layer") from None
    require(keep > shared, f"keep = {keep} must be above the {shared} shared experts, which are kept")
    require_finite(layers)
    require(
        not any(isinstance(layer.experts, CompressedExperts) for layer in layers),
        "the experts are already compressed: operate on the uncompressed model, and compress last",
    )
    widths = sorted({layer.experts.down.shape[1] for layer in layers})
    require(len(widths) == 1, f"the layers have experts of different widths {widths}, which a single d_expert cannot describe")
    return keep


@torch.no_grad()
def _replace(layer: MoELayer, experts: Sequence[Expert], groups: Sequence[Group]) -> None:
    """Replace the layer's experts with these, and its router rows with those of the groups' leaders."""
    if layer.config.gate_weight == "unit":  # an expert of a plain sum stands for the sum of its group, not for the mean
        experts = [
            expert._replace(down_HD=expert.down_HD * len(group.members), bias_down_D=expert.bias_down_D * len(group.members))
            for expert, group in zip(experts, groups, strict=True)
        ]
    count, scale_before = len(experts), layer.output_scale
    layer.output_scale = 1.0 if layer.config.output_scale == "mean" else float(count)
    names, stacked = ("up", "bias_up", "down", "bias_down"), (torch.stack(tensors) for tensors in zip(*experts, strict=True))
    for name, tensor in zip(names, stacked, strict=True):
        if "down" in name and layer.output_scale != scale_before:
            tensor = tensor * (scale_before / layer.output_scale)  # keep the scale of the sum over experts
        setattr(layer.experts, name, nn.Parameter(tensor, getattr(layer.experts, name).requires_grad))
    layer.router.keep([group.leader for group in groups], sum(len(group.members) for group in groups))
    layer.num_experts = count
    layer.default_k = min(layer.default_k, count)
