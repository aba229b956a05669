"""Control of a model's MoE layers: k, frozen routers, auxiliary losses, and expert load."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import boolean, integer, is_finite, require_module, shown
from smoe_dropout.config import SMoEConfig
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import PACKAGE, unknown
from smoe_dropout.routers import LogitRouter
from smoe_dropout.selection import CHOSEN, GateMass, TokenK, block, bound


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Names and modules of all MoE layers, in the model's order. ConfigError for something that is not a model."""
    require_module(model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]


def layers_or_raise(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """As `moe_layers`. ConfigError also for a model without MoE layers."""
    if not (layers := moe_layers(model)):
        raise ConfigError(f"{type(model).__name__} has no MoE layers: call moefy(model, SMoEConfig(...)) first")
    return layers


def conversions(model: nn.Module) -> list[SMoEConfig]:
    """Configurations of the calls of `moefy` that made the MoE layers, with the k that is set now, in order; empty for a dense model.

    `for config in conversions(model): moefy(dense, config)` makes such a model again.
    """
    return [replace(layers[0].config, **stored_k(layers)) for layers in converted_together(model)]


def converted_together(model: nn.Module) -> list[list[MoELayer]]:
    """MoE layers by the call of `moefy` that made them, in order."""
    found: dict[tuple[int, SMoEConfig], list[MoELayer]] = {}
    for _, layer in moe_layers(model):
        found.setdefault((layer.conversion, layer.config), []).append(layer)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def places(layers: Sequence[MoELayer]) -> list[int]:
    """Position of each layer in the lists by layer of their configuration."""
    indices = [layer.index for layer in layers]  # parts of a model that were converted alike, one by one, have the same
    return indices if len(set(indices)) == len(indices) else list(range(len(layers)))


def stored_k(layers: Sequence[MoELayer]) -> dict[str, Any]:
    """The fields of `SMoEConfig` that describe what `set_top_k` has set for layers that were converted together."""
    k, config = max(layer.default_k for layer in layers), layers[0].config
    if all(layer.default_k == min(k, layer.num_experts) for layer in layers):
        return {"top_k": k, "top_k_by_layer": None}
    known = dict(zip(places(layers), (layer.default_k for layer in layers), strict=True))
    count = max(layers[0].count, len(layers))  # more than these, if the model is a part of what was converted
    ks = tuple(known[place] if place in known else config.of_layer(place).top_k for place in range(count))
    return {"top_k": max(ks), "top_k_by_layer": ks}


def only_conversion(model: nn.Module) -> SMoEConfig:
    """Configuration of a model's MoE layers. ConfigError if several conversions made them, each with its own."""
    found = conversions(model)
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__} was converted in {len(found)} steps, but this needs one configuration for all MoE layers"
        )
    return found[0]


K = int | Tensor | Sequence[int | Tensor] | Mapping[str, int | Tensor]


def set_top_k(model: nn.Module, k: int | Sequence[int] | Mapping[str, int]) -> None:
    """Activate k experts per token in every MoE layer, from now on and in every thread. It is saved with the model.

    k: a number, a list with one for each MoE layer, or a mapping from names of MoE layers, where the others keep theirs. If layers differ
    in their number of experts, one number for all may be up to the largest, and layers with fewer activate all of theirs. Raises
    ConfigError for any other k, and if the model has no MoE layers.
    """
    changes = {layer: value for layer, value in default_k(model, k).items() if layer.default_k != value}
    for layer, value in changes.items():
        layer.default_k = value
    if changes:
        _propagate(model)
    _allow_graphs(model)


def get_top_k(model: nn.Module) -> int | dict[str, int]:
    """k in this thread or task: the number that `set_top_k` would set, or one by layer name if it differs between layers.

    ConfigError if the model has no MoE layers, or a k for each row or token or a gate mass is selected.
    """
    layers = layers_or_raise(model)
    found = {name: layer.top_k for name, layer in layers}
    k = max(found.values())
    return found if any(found[name] != min(k, layer.num_experts) for name, layer in layers) else k


@block
def top_k(model: nn.Module, k: K) -> Iterator[nn.Module]:
    """Context manager that activates k experts in the calling thread or asyncio task; other threads and tasks are not affected.

    k: a number, a tensor with one for each row [B] or token [B, T] of a batch, or a list or mapping by layer of these, as in `set_top_k`.
    Work is done only for the experts that a row or token uses. As a decorator it opens a block for each call, also of a coroutine function.
    ConfigError as in `set_top_k`, in a pass whose batch has another shape, and as the decorator of a generator function.
    """
    layers = layers_or_raise(model)
    _allow_graphs(model)
    with bound(CHOSEN, _by_layer(layers, k)):
        yield model


@block
def top_p(model: nn.Module, p: float, k_min: int = 1, k_max: int | None = None) -> Iterator[nn.Module]:
    """Context manager that activates as many experts per token as it takes to reach the fraction p of the router's probability.

    The experts are taken in the router's order, at least k_min and at most k_max of them (None: all). `mean_k` tells how many it took.
    Holds in the calling thread or task, as `top_k`. ConfigError for numbers out of range, and for a router without logits.
    """
    layers = layers_or_raise(model)
    most = max(layer.num_experts for _, layer in layers)
    k_min, k_max = integer("k_min", k_min, 1, most), integer("k_max", most if k_max is None else k_max, 1, most)
    if not (is_finite(p) and 0 < p <= 1):
        raise ConfigError(f"p = {shown(p)} must be a number above 0 and at most 1")
    if k_min > k_max:
        raise ConfigError(f"k_min = {k_min} must not be more than k_max = {k_max}")
    for name, layer in layers:
        if not (isinstance(layer.router, LogitRouter) and type(layer.router).ragged):
            raise ConfigError(f"the router of {name!r} has no logits, so there is no gate mass: use top_k(model, k)")
    k_min = k_max if p == 1 else k_min  # rounded masses may reach 1 before the last expert, or never
    masses = {layer: GateMass(float(p), min(k_min, layer.num_experts), min(k_max, layer.num_experts)) for _, layer in layers}
    _allow_graphs(model)
    with bound(CHOSEN, masses):
        yield model


def mean_k(model: nn.Module) -> dict[str, float]:
    """Mean number of experts per token in the last pass, without padding, by layer name, for layers that have run."""
    return {name: layer.mean_k() for name, layer in moe_layers(model) if layer.uses}


def _by_layer(layers: list[tuple[str, MoELayer]], k: Any) -> dict[MoELayer, int | TokenK]:
    """k of each layer. ConfigError for what is not one."""
    if isinstance(k, Mapping):
        if (check_of := getattr(k, "check_of", None)) is not None:  # a plan
            check_of(layers)
        named = dict(layers)
        if unknown_names := [name for name in k if name not in named]:
            raise ConfigError(unknown("MoE layer", str(unknown_names[0]), list(named)))
        return {named[name]: _of_layer(name, named[name], value) for name, value in k.items()}
    if isinstance(k, list | tuple):
        if len(k) != len(layers):
            raise ConfigError(f"k = {shown(k)} gives {len(k)} numbers, but the model has {len(layers)} MoE layers")
        return {layer: _of_layer(name, layer, value) for (name, layer), value in zip(layers, k, strict=True)}
    if isinstance(k, Tensor) and k.dim() > 0:
        most = max(layer.num_experts for _, layer in layers)
        token_k = _token_k(k, most, f"the {most} experts of the largest layer")
        counts = {layer.num_experts for _, layer in layers}
        by_count = {count: TokenK(token_k.values.clamp(max=count), min(token_k.largest, count)) for count in counts}
        return {layer: by_count[layer.num_experts] for _, layer in layers}
    k = _checked_k(layers, k)
    return {layer: min(k, layer.num_experts) for _, layer in layers}


def default_k(model: nn.Module, k: int | Sequence[int] | Mapping[str, int]) -> dict[MoELayer, int]:
    """k of each layer that `set_top_k` would set. Raises ConfigError as that does."""
    chosen = _by_layer(layers_or_raise(model), k)
    if any(not isinstance(value, int) for value in chosen.values()):
        raise ConfigError("k for rows or tokens belongs to one batch and cannot be set for good: use `with top_k(model, k)`")
    return chosen


def _of_layer(name: str, layer: MoELayer, k: Any) -> int | TokenK:
    if isinstance(k, Tensor) and k.dim() > 0:
        return _token_k(k, layer.num_experts, f"the {layer.num_experts} experts of layer {name!r}")
    return _checked_k([(name, layer)], k)


def _token_k(k: Tensor, most: int, of: str) -> TokenK:
    if k.is_meta or k.is_nested or k.layout != torch.strided:
        kind = "nested" if k.is_nested else k.layout
        raise ConfigError(
            f"k is a {kind} tensor on {k.device}: give an ordinary one with values, for the rows [B] or tokens [B, T] of a batch"
        )
    if k.dim() > 2 or k.is_floating_point() or k.is_complex() or k.dtype == torch.bool or k.numel() == 0:
        raise ConfigError(f"k is a tensor {list(k.shape)} of {k.dtype}, not of whole numbers for the rows [B] or tokens [B, T] of a batch")
    k = k.to(torch.int64, copy=True)  # which nobody else changes inside the block
    smallest, largest = (int(value) for value in k.aminmax())
    if smallest < 1 or largest > most:
        raise ConfigError(f"k = {smallest if smallest < 1 else largest} must be a whole number from 1 to {of}")
    return TokenK(k, largest)


def _checked_k(layers: list[tuple[str, MoELayer]], k: Any) -> int:
    """k as a Python integer. ConfigError unless it is a whole number that some layer has experts for."""
    k, counts = integer("k", k, None, None), [layer.num_experts for _, layer in layers]
    if not 1 <= k <= max(counts):
        of = "the largest layer" if min(counts) < max(counts) else f"layer {layers[0][0]!r}"
        raise ConfigError(f"k = {shown(k)} must be a whole number from 1 to the {max(counts)} experts of {of}")
    return k


def freeze_routers(model: nn.Module, frozen: bool = True) -> None:
    """Freeze the routers' parameters, or unfreeze them with `frozen=False`. ConfigError if the model has no MoE layers."""
    layers, frozen = layers_or_raise(model), boolean("frozen", frozen)
    for _, layer in layers:
        for parameter in layer.routing_parameters():
            parameter.requires_grad_(not frozen)
    _propagate(model, freeze_router=frozen)


def configure(model: nn.Module, **changes: Any) -> None:
    """Record changed fields of `SMoEConfig` in every copy of the configuration. ConfigError for a model converted in several steps."""
    layers = layers_or_raise(model)
    changed = replace(only_conversion(model), **changes)
    for _, layer in layers:
        layer.config = changed
    _propagate(model, **changes, top_k=changed.top_k, top_k_by_layer=changed.top_k_by_layer)


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


def _propagate(model: nn.Module, **changed: Any) -> None:
    """Write k and other changes to the configuration that a transformers model is saved with."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        stored = getattr(config, PACKAGE, None)
        if stored is None or id(config) in seen:
            continue
        seen.add(id(config))
        entries, groups = [stored] if isinstance(stored, dict) else stored, converted_together(module)
        whole = len(groups) == len(entries) and all(len(layers) == layers[0].count for layers in groups)
        for place, entry in enumerate(entries):
            entry |= {**changed, **(stored_k(groups[place]) if whole else {})}


def _allow_graphs(model: nn.Module) -> None:
    """Let torch.compile make a graph per k, also of rows, in training and evaluation; beyond its limit it silently runs eagerly."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        most = max(layer.num_experts for _, layer in moe_layers(model))
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 4 * most + 8)
