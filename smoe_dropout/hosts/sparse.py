"""Mixtures of experts that a model has by itself. They are recognised by structure, and nothing inside them is converted."""

from __future__ import annotations

from torch import nn

from smoe_dropout.hosts.maps import stands_for_map
from smoe_dropout.hosts.network import maps_in
from smoe_dropout.layer import MoELayer


def sparse_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost modules with a router and E experts of their own, by name; MoE layers of this library are none."""
    found: dict[str, nn.Module] = {}
    ours: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in (*found, *ours)):
            continue
        if isinstance(module, MoELayer):
            ours.append(name)
        elif name and _is_sparse(module):
            found[name] = module
    return found


def _is_sparse(module: nn.Module) -> bool:
    """Whether one child holds E experts and another one scores E of them."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    children = list(module.children())
    routers = {child: count for child in children if (count := _scored(child)) > 1}
    return any(_holds(child, count) for router, count in routers.items() for child in children if child is not router)


def _scored(module: nn.Module) -> int:
    """Number of values that the module computes for a token, if it has one map and nothing larger than a vector besides; else 0."""
    maps = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    return maps[0].shape[0] if len(maps) == 1 and maps[0].dim() == 2 and not isinstance(module, nn.Embedding) else 0


def _holds(module: nn.Module, count: int) -> bool:
    """Whether the module holds this many experts: equal networks in a list, or weights stacked in one tensor."""
    for part in (module, *module.children()):
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            networks = list(part.children())
            alike = len(networks) == count and len({type(one) for one in networks}) == 1
            if alike and all(len(maps_in(one)) in (2, 3) for one in networks):
                return True
        elif not stands_for_map(part) and not isinstance(part, nn.modules.conv._ConvNd | nn.Embedding):
            own = [parameter for parameter in part._parameters.values() if parameter is not None and parameter.dim() > 1]
            stacked = [parameter for parameter in own if parameter.dim() == 3 and parameter.shape[0] == count]
            flat = [parameter for parameter in own if parameter.dim() == 2 and parameter.shape[0] % count == 0]
            if stacked or len(flat) > 1:
                return True
    return False
