"""The knobs of a model with MoE layers: k, frozen routers, auxiliary losses, expert load."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout.layer import MoELayer


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """All MoE layers of the model with their names, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]


def set_top_k(model: nn.Module, k: int) -> None:
    """Makes k experts active per token in every MoE layer. Where a model's layers differ in their experts, k may be as large as the largest
    one's, and a layer that has fewer has all of them active. ValueError for another k, or if the model has no MoE layers.
    """
    layers = _layers_or_raise(model)
    if not isinstance(k, Integral) or isinstance(k, bool):  # numpy's whole numbers are
        raise ValueError(f"k = {k!r} must be a whole number")
    for name, layer in layers:
        if not 1 <= k <= layer.config.num_experts:
            of = "the largest layer" if layer.config.experts_by_layer else f"layer {name!r}"
            raise ValueError(f"k = {k} must be a whole number from 1 to the {layer.config.num_experts} experts of {of}")
    for _, layer in layers:
        layer.top_k = _own_k(layer, int(k))
    _tell(model, layers)


def get_top_k(model: nn.Module) -> int:
    """The k of the MoE layers, that of the largest where they differ in their experts. ValueError if the model has none, or another k."""
    layers = _layers_or_raise(model)
    k = _largest_k(layers)
    if any(layer.top_k != _own_k(layer, k) for _, layer in layers):
        raise ValueError(f"the MoE layers have different k: {dict((name, layer.top_k) for name, layer in layers)}")
    return k


@contextmanager
def top_k(model: nn.Module, k: int) -> Iterator[nn.Module]:
    """Within the block k experts are active; afterwards every layer has its own k back, also after an exception."""
    layers = _layers_or_raise(model)
    before = [(layer, layer.top_k) for _, layer in layers]
    set_top_k(model, k)
    try:
        yield model
    finally:
        for layer, k_before in before:
            layer.top_k = k_before
        _tell(model, layers)


def freeze_routers(model: nn.Module, frozen: bool = True) -> None:
    """Takes the routers' parameters out of training, or with `frozen=False` puts them back in. ValueError if there is no router."""
    layers = _layers_or_raise(model)
    for _, layer in layers:
        for parameter in layer.routing_parameters():
            parameter.requires_grad_(not frozen)
    _tell(model, layers, freeze_router=frozen)


def configure(model: nn.Module, **changes: Any) -> None:
    """Notes what has changed of the experts, by field of `SMoEConfig`, wherever their configuration stands."""
    layers = _layers_or_raise(model)
    for _, layer in layers:
        layer.config = replace(layer.config, **changes)
    _tell(model, layers, **changes)


def auxiliary_losses(model: nn.Module) -> list[Tensor]:
    """The routers' losses of the last forward pass in training mode."""
    return [loss for _, layer in moe_layers(model) for loss in layer.losses.values()]


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Their sum; zero where there are none, as with a frozen router, or after a pass in evaluation.

    To be added to the loss in a training loop of one's own; a model of the transformers library adds it to the loss it returns by itself.
    """
    if losses := auxiliary_losses(model):
        return sum(losses[1:], losses[0])
    some = next(model.parameters(), None)
    return torch.zeros((), device=None if some is None else some.device)


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """For every MoE layer that ran, the share of assignments each expert got in its last forward pass [E]."""
    return {name: layer.load() for name, layer in moe_layers(model) if layer.assigned is not None}


def _own_k(layer: MoELayer, k: int) -> int:
    return k if layer.config.experts_by_layer is None else min(k, layer.num_experts)


def _largest_k(layers: list[tuple[str, MoELayer]]) -> int:
    return max(layer.top_k for _, layer in layers)


def _tell(model: nn.Module, layers: list[tuple[str, MoELayer]], **changed: Any) -> None:
    """Passes k, and what else has `changed`, on to what depends on it: the configuration that a transformers model is saved with, and the
    compiler.
    """
    k, most = _largest_k(layers), max(layer.num_experts for _, layer in layers)
    for module in model.modules():
        told = getattr(getattr(module, "config", None), __package__, None)
        if isinstance(told, dict):
            told |= {"top_k": k, **changed}
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        # one graph per k, in training and in evaluation; past its limit torch.compile runs eagerly without a word
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 2 * most + 8)


def _layers_or_raise(model: nn.Module) -> list[tuple[str, MoELayer]]:
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers: call moefy(model, SMoEConfig(...)) first")
    return layers


def slim(model: nn.Module, k: int, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy with k active experts in every MoE layer, in evaluation mode and without gradients; the model stays as it is.

    The paper's self-slimmable inference: time and active parameters fall with k; all experts stay, unless `operate` takes some away before.
    `dtype`: of all weights but the routers', which stay as they are, since a rounded router may choose others. ValueError for a k that some
    layer has not, or a model without experts.
    """
    slimmed = copy.deepcopy(model).eval().requires_grad_(False)
    set_top_k(slimmed, k)
    if dtype is not None:
        routers = [(layer, copy.deepcopy(layer.router)) for _, layer in moe_layers(slimmed)]
        slimmed.to(dtype)
        for layer, router in routers:
            layer.router = router
    return slimmed
