"""Checks of a model's routers when a pass begins: that their weights are finite, and that those to be trained learn from the task."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from smoe_dropout.control import moe_layers
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError
from smoe_dropout.selection import largest, selected


def require_finite_routers(model: nn.Module) -> None:
    """Raise ConfigError, with the layer and the parameter, if a value that determines the routing is NaN or infinite."""
    for name, layer in moe_layers(model):
        for own, tensor in _routing_tensors(layer):
            if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.detach().isfinite().all()):
                raise ConfigError(
                    f"{own!r} of the MoE layer {name!r} has values that are NaN or infinite, so it cannot route: load the weights from "
                    "before the training diverged"
                )


def _routing_tensors(layer: MoELayer) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the router, and parameters of the layer itself, with their names in the layer."""
    router = itertools.chain(layer.router.named_parameters(prefix="router"), layer.router.named_buffers(prefix="router"))
    return itertools.chain(layer.named_parameters(recurse=False), router)


def untrained_router(model: nn.Module, layers: Sequence[MoELayer] | None = None, k: int | None = None) -> str | None:
    """Sentence about the first trained router whose gate weights do not depend on its parameters, at this k or that of each layer.

    None if there is no such router, or if one of the model was named before. layers: those of the model. A balance loss may train such a
    router, the task does not.
    """
    layers = [layer for _, layer in moe_layers(model)] if layers is None else layers
    if any(layer.router_named for layer in layers) or not (found := [layer for layer in layers if _is_untrained(layer, k)]):
        return None
    layer, router = found[0], found[0].router
    layer.router_named = True
    name = next((name for name, one in moe_layers(model) if one is layer), "")
    why = (
        f"{router.gate_weight!r} gate weights are all equal"
        if router.equal
        else f"at k = {_most(layer, k)} the gate weight is always the same"
    )
    other = "only the balance loss does" if getattr(router, "balance_loss", 0) else "and there is no balance loss"
    remedy = router.trains_at_any_k if router.equal else f"{router.trains_at_any_k}, a larger k,"
    return f"the task does not train the router of {name!r}, since {why}, {other}: use {remedy} or freeze the routers"


def _is_untrained(layer: MoELayer, k: int | None) -> bool:
    if layer.num_experts == 1 or layer.own_losses or layer.router.learns_from_task(_most(layer, k)):
        return False
    return any(parameter.requires_grad for parameter in layer.routing_parameters())


def _most(layer: MoELayer, k: int | None) -> int:
    return min(k or largest(selected(layer)), layer.num_experts)
