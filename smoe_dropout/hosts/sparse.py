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
    """Whether a child holds E experts and something else scores E of them, or a child is called experts."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    children = dict(module.named_children())
    if any("expert" in name.lower() and maps_in(child) for name, child in children.items()):
        return True
    own = [min(parameter.shape) for parameter in module._parameters.values() if parameter is not None and parameter.dim() == 2]
    for child in children.values():
        scored = own + [_scored(other) for other in children.values() if other is not child]
        if any(count > 1 and _holds(child, count) for count in scored):
            return True
    return False


def _scored(module: nn.Module) -> int:
    """Number of values that the module computes for a token, if its only maps are one or two of the same shape; else 0."""
    shapes = [tuple(parameter.shape) for parameter in module.parameters() if parameter.dim() > 1]
    alike = 0 < len(shapes) < 3 and len(set(shapes)) == 1 and len(shapes[0]) == 2
    return shapes[0][0] if alike and not isinstance(module, nn.Embedding) else 0


def _holds(module: nn.Module, count: int) -> bool:
    """Whether the module holds this many experts: equal networks in a list, or weights stacked in one tensor."""
    for part in (module, *module.children()):
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            networks = [child for child in part.children() if len(maps_in(child)) in (2, 3)]
            if len(networks) == count and len({type(one) for one in networks}) == 1:
                return True
        elif not stands_for_map(part) and not isinstance(part, nn.modules.conv._ConvNd | nn.Embedding):
            own = [parameter for parameter in part._parameters.values() if parameter is not None and parameter.dim() > 1]
            stacked = [parameter for parameter in own if parameter.dim() == 3 and parameter.shape[0] == count]
            flat = [parameter for parameter in own if parameter.dim() == 2 and parameter.shape[0] % count == 0]
            if stacked or len(flat) > 1:
                return True
    return False
