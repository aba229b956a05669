"""Control of a model's MoE layers: k, frozen routers, auxiliary losses, expert load, and slimmed copies."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import boolean, integer, require_module, shown
from smoe_dropout.config import SMoEConfig
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import PACKAGE


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Names and modules of all MoE layers, in the model's order. ConfigError for something that is not a model."""
    require_module(model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]


def conversions(model: nn.Module) -> list[SMoEConfig]:
    """Configurations of the calls of `moefy` that made the MoE layers, in order; empty for a dense model.

    `for config in conversions(model): moefy(dense, config)` makes such a model again.
    """
    found = {(layer.conversion, layer.config): layer.config for _, layer in moe_layers(model)}
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def only_conversion(model: nn.Module) -> SMoEConfig:
    """Configuration of a model's MoE layers. ConfigError if several conversions made them, each with its own."""
    found = conversions(model)
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__} was converted in {len(found)} steps, but this needs one configuration for all MoE layers"
        )
    return found[0]


def set_top_k(model: nn.Module, k: int) -> None:
    """Activate k experts per token in every MoE layer.

    If layers differ in their number of experts, k may be up to the largest, and layers with fewer than k activate all of theirs. Raises
    ConfigError for any other k, and if the model has no MoE layers.
    """
    layers = _layers_or_raise(model)
    k = _checked_k(layers, k)
    for _, layer in layers:
        layer.top_k = min(k, layer.num_experts)
    _propagate(model, layers)


def _checked_k(layers: list[tuple[str, MoELayer]], k: int) -> int:
    """k as a Python integer. ConfigError unless it is a whole number that some layer has experts for."""
    k, counts = integer("k", k, None, None), [layer.num_experts for _, layer in layers]
    if not 1 <= k <= max(counts):
        of = "the largest layer" if min(counts) < max(counts) else f"layer {layers[0][0]!r}"
        raise ConfigError(f"k = {shown(k)} must be a whole number from 1 to the {max(counts)} experts of {of}")
    return k


def get_top_k(model: nn.Module) -> int:
    """The k that `set_top_k` would set. ConfigError if the model has no MoE layers, or they do not agree."""
    layers = _layers_or_raise(model)
    k = _largest_k(layers)
    if any(layer.top_k != min(k, layer.num_experts) for _, layer in layers):
        raise ConfigError(f"the MoE layers have different k: {dict((name, layer.top_k) for name, layer in layers)}")
    return k


@contextmanager
def top_k(model: nn.Module, k: int) -> Iterator[nn.Module]:
    """Context manager that activates k experts and restores each layer's k on exit. ConfigError as in `set_top_k`."""
    layers = _layers_or_raise(model)
    before = [(layer, layer.top_k) for _, layer in layers]
    set_top_k(model, k)
    try:
        yield model
    finally:
        for layer, k_before in before:
            layer.top_k = k_before
        _propagate(model, layers)


def freeze_routers(model: nn.Module, frozen: bool = True) -> None:
    """Freeze the routers' parameters, or unfreeze them with `frozen=False`. ConfigError if the model has no MoE layers."""
    layers, frozen = _layers_or_raise(model), boolean("frozen", frozen)
    for _, layer in layers:
        for parameter in layer.routing_parameters():
            parameter.requires_grad_(not frozen)
    _propagate(model, layers, freeze_router=frozen)


def configure(model: nn.Module, **changes: Any) -> None:
    """Record changed fields of `SMoEConfig` in every copy of the configuration. ConfigError for a model converted in several steps."""
    layers = _layers_or_raise(model)
    changed = replace(only_conversion(model), **changes)
    for _, layer in layers:
        layer.config = changed
    _propagate(model, layers, **changes)


def auxiliary_losses(model: nn.Module) -> list[Tensor]:
    """Auxiliary losses of the last forward pass in training mode."""
    return [loss for _, layer in moe_layers(model) for loss in layer.losses.values()]


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses; zero if there are none, as with a frozen router or after an evaluation pass.

    Add it to the loss in your own training loop. Models of the transformers library add it to the loss they return.
    """
    if losses := auxiliary_losses(model):
        return sum(losses[1:], losses[0])
    some = next(model.parameters(), None)
    return torch.zeros((), device=None if some is None else some.device)


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """Fraction of assignments that each expert received in the last forward pass [E], by layer name, for layers that have run."""
    return {name: layer.load() for name, layer in moe_layers(model) if layer.assigned is not None}


def _largest_k(layers: list[tuple[str, MoELayer]]) -> int:
    return max(layer.top_k for _, layer in layers)


def _propagate(model: nn.Module, layers: list[tuple[str, MoELayer]], **changed: Any) -> None:
    """Write k and other changes to the configuration that a transformers model is saved with, and adjust the compiler's limit."""
    k, most = _largest_k(layers), max(layer.num_experts for _, layer in layers)
    for module in model.modules():
        stored = getattr(getattr(module, "config", None), PACKAGE, None)
        for entry in [stored] if isinstance(stored, dict) else stored or []:
            entry |= {"top_k": min(k, changed.get("num_experts", entry["num_experts"])), **changed}
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        # one graph per k, in training and in evaluation; beyond its limit torch.compile silently runs eagerly
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 2 * most + 8)


def _layers_or_raise(model: nn.Module) -> list[tuple[str, MoELayer]]:
    layers = moe_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no MoE layers: call moefy(model, SMoEConfig(...)) first")
    return layers


def slim(model: nn.Module, k: int, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy of the model with k active experts in every MoE layer, in evaluation mode and without gradients. The model is not changed.

    This is the paper's self-slimmable inference: time and active parameters decrease with k. All experts are kept; `operate` removes some.
    dtype: precision of all weights except those that determine the routing, whose rounding could change which experts are chosen. Raises
    ConfigError for a model without MoE layers, as in `set_top_k`, and for a dtype that is not a floating-point torch.dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype = {dtype!r} must be a floating-point dtype, such as torch.bfloat16, or None")
    k = _checked_k(_layers_or_raise(model), k)
    slimmed = copy.deepcopy(model).eval().requires_grad_(False)
    set_top_k(slimmed, k)
    if dtype is not None:
        layers = [layer for _, layer in moe_layers(slimmed)]
        routers = [copy.deepcopy(layer.router) for layer in layers]
        routing = [(parameter, parameter.data) for layer in layers for parameter in layer.routing_parameters()]
        slimmed.to(dtype)
        for layer, router in zip(layers, routers, strict=True):
            layer.router, router.shared = router, layer.shared
        for parameter, values in routing:
            parameter.data = values
    return slimmed
