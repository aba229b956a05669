"""Where a model's own mixture-of-experts blocks are, and what they consist of.

A block has experts, whose weights are stacked in 3-D parameters or lie in a list of feed-forward networks, and a router with a row
per expert. Shape suffixes as in `experts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from smoe_dropout.layer import MoELayer

# of the child that holds them; distinguishes a list of experts from one of layers, and experts of unknown form from other networks
EXPERTS, UNREADABLE = re.compile("expert", re.IGNORECASE), re.compile(r"experts?_?\d*", re.IGNORECASE)


class Parts(NamedTuple):
    """Names of a block's parameters, relative to the block.

    num_experts: E. maps: of the experts, those that lead into the hidden units first, then the one that leads out; of listed experts the
    names of each expert, one after another. biases: of the maps, in their order, or empty. router: the weight [E, D]. vectors: parameters
    and buffers with one value per expert. shared: children computed for every token. others: parameters that are none of these.
    """

    num_experts: int
    maps: tuple[tuple[str, ...], ...]
    biases: tuple[tuple[str, ...], ...]
    router: str
    vectors: tuple[str, ...]
    shared: tuple[str, ...]
    others: tuple[str, ...]


def native_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the mixture-of-experts blocks that are the model's own, in its order; MoE layers of this library are not."""
    found: list[tuple[str, nn.Module]] = []
    converted = [f"{name}." for name, module in model.named_modules() if isinstance(module, MoELayer)]
    for name, module in model.named_modules():
        inside = name.startswith(tuple(f"{outer}." for outer, _ in found)) or f"{name}.".startswith(tuple(converted))
        in_stack = any(part.isdigit() for part in name.split("."))
        if not inside and any(True for _ in _experts(module, in_stack)):
            found.append((name, module))
    return found


def parts_of(block: nn.Module) -> Parts | str:
    """The parts of a block that `native_blocks` found, or a sentence why they cannot be told apart."""
    experts = next(_experts(block, in_stack=True))
    names = dict(block.named_parameters())
    own = [name for name in names if any(name.startswith(f"{child}.") for child in experts)]
    if len(experts) == 1 and _is_list_of_networks(listed := block.get_submodule(experts[0])):
        listed = _listed(listed)
        count, inner = len(listed), [name for name, _ in next(iter(listed.values())).named_parameters()]
        prefixes = [f"{experts[0]}.{child}" for child in listed]
        stacks = {name: tuple(f"{prefix}.{name}" for prefix in prefixes) for name in inner}
        if sorted(name for stack in stacks.values() for name in stack) != sorted(own):
            return "its experts differ from each other"
        maps = tuple(stack for name, stack in stacks.items() if names[stack[0]].dim() == 2)
        biases = tuple(stack for name, stack in stacks.items() if names[stack[0]].dim() == 1)
    else:
        if not any(names[name].dim() == 3 for name in own):
            return "its experts are neither stacked in parameters [E, ...] nor a list of feed-forward networks"
        count = len(names[own[0]])
        maps = tuple((name,) for name in own if names[name].dim() == 3)
        biases = tuple((name,) for name in own if names[name].dim() == 2)
    if len(biases) not in (0, len(maps)):
        return f"{len(biases)} of its experts' {len(maps)} maps have a bias"
    rest = {**{name: parameter for name, parameter in names.items() if name not in own}, **dict(block.named_buffers())}
    matrices = [name for name, tensor in rest.items() if tensor.dim() == 2 and len(tensor) > 1]
    alone = Counter(name.partition(".")[0] for name in matrices)  # a shared network may be as wide as there are experts
    routers = [name for name in matrices if len(rest[name]) == count and alone[name.partition(".")[0]] == 1]
    if len(routers) != 1:
        return f"it has {len(routers)} maps with a row for each of its {count} experts, instead of one router"
    outer = routers[0].partition(".")[0]
    near = [name for name in rest if name != routers[0] and name.partition(".")[0] in (outer, name)]  # in the router, or the block itself
    vectors = tuple(name for name in near if rest[name].numel() == count and rest[name].is_floating_point())
    taken = {routers[0], *vectors}
    shared = {name.partition(".")[0] for name in rest if name not in taken and "." in name} - {outer}
    shared = tuple(name for name, _ in block.named_children() if name in shared)
    others = tuple(name for name in rest if name not in taken and name.partition(".")[0] not in shared)
    return Parts(count, maps, biases, routers[0], vectors, shared, others)


def _experts(module: nn.Module, in_stack: bool) -> Iterator[tuple[str, ...]]:
    """Names of the children that hold the experts: one with all their maps, or several with one map each. Unreadable ones come last.

    in_stack: whether the module is part of a stack of layers. If not, a list of networks is one of experts by its name only, since layers
    and the head of a classifier may be as many.
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential | nn.modules.conv._ConvNd):
        return
    single: dict[int, list[str]] = {}
    unreadable: list[str] = []
    for name, child in module.named_children():
        stacked = _stacked(child)
        counts, named = {len(tensor) for tensor in stacked}, EXPERTS.search(name)
        together = len(stacked) > 1 and (named or (len(counts) == 1 and _has_router(module, (name,), *counts)))
        listed = _is_list_of_networks(child) and (named or (in_stack and _has_router(module, (name,), len(_listed(child)), turned=True)))
        if together or listed:
            yield (name,)
        elif UNREADABLE.fullmatch(name) and sum(parameter.dim() > 1 for parameter in child.parameters()) > 1:
            unreadable.append(name)
        elif len(stacked) == 1:
            single.setdefault(len(stacked[0]), []).append(name)
    for count, names in single.items():
        if len(names) > 1 and _has_router(module, tuple(names), count):
            yield tuple(names)
    yield from ((name,) for name in unreadable)


def _stacked(module: nn.Module) -> list[Tensor]:
    """The module's own 3-D parameters, if it is no convolution."""
    if isinstance(module, nn.modules.conv._ConvNd) or nn.utils.parametrize.is_parametrized(module):
        return []
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3 and len(parameter) > 1]


def _is_list_of_networks(module: nn.Module) -> bool:
    """Return whether the module lists two or more modules of one class whose parameters are those of two or three linear maps."""
    networks = list(_listed(module).values())
    return (
        isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len(networks) > 1
        and len({type(network) for network in networks}) == 1
        and all(map(_is_network, networks))
    )


def _listed(module: nn.Module) -> dict[str, nn.Module]:
    """The module's children that have parameters."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _is_network(module: nn.Module) -> bool:
    maps = [child for child in module.modules() if isinstance(child, nn.Linear)]
    return len(maps) in (2, 3) and {id(p) for child in maps for p in child.parameters()} == {id(p) for p in module.parameters()}


def _has_router(block: nn.Module, experts: tuple[str, ...], count: int, turned: bool = False) -> bool:
    """Return whether a matrix outside the experts has a row for each of them; turned: or a column."""
    inner = tuple(f"{name}." for name in experts)
    matrices = [p for name, p in block.named_parameters() if p.dim() == 2 and not name.startswith(inner)]
    return any(count in (parameter.shape if turned else parameter.shape[:1]) for parameter in matrices)
