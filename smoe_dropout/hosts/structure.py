"""Feed-forward networks of any architecture, found by what modules compute and not by their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from smoe_dropout.hosts.blocks import Lying, lying
from smoe_dropout.hosts.maps import is_adapted, linear_map, obstacle, sizes_of
from smoe_dropout.hosts.network import Network, fits, maps_in, recognise
from smoe_dropout.hosts.probe import ORDERS
from smoe_dropout.hosts.site import Site
from smoe_dropout.hosts.source import misfit
from smoe_dropout.layer import MoELayer
from smoe_dropout.registry import PATTERNS


class Survey(NamedTuple):
    """The networks found, by name of their place, and the modules that look like one but are none, with the reasons."""

    sites: list[Site]
    left: list[tuple[str, str]]


def survey(model: nn.Module, taken: set[nn.Module]) -> Survey:
    """Look at all modules of the model except those in `taken`, and MoE layers."""
    sites: list[Site] = []
    left: dict[str, str] = {}
    loose: list[Site] = []
    done = set(taken)
    for name, module in model.named_modules():
        if module in done:
            continue
        if isinstance(module, MoELayer) or (name and (is_adapted(module) or obstacle(module))):
            done |= set(module.modules())
            continue
        parts = maps_in(module)
        if name and len(parts) in (2, 3) and not any(part in done for part in parts.values()):
            found = innermost(module, name)
            if found is not None:
                place, network = found
                done |= set(model.get_submodule(place).modules())
                if (reason := misused(model, model.get_submodule(place))) is not None:
                    left[place] = reason
                    continue
                site = whole(model, place, network)
                (sites if _usual(site, _known(model.get_submodule(place))) else loose).append(site)
                continue
            if _candidate(module, parts):
                left[name] = str(recognise(module))
        for up, down, known in pairs(module, parts, done):
            result = lying(module, up, down)
            if isinstance(result, Lying):
                done |= {module.get_submodule(up), module.get_submodule(down), *module.get_submodule(result.place).modules()}
                left.pop(name, None)
                site = in_block(module, name, result)
                (sites if _usual(site, known) else loose).append(site)
            elif known or (name and "one after the other" not in result and not _attention_like(module)):
                left[name] = nearest([left[name], result] if name in left else [result])
    narrow = [site for site in loose if site.d_ff < site.d_model]
    loose = [site for site in loose if site.d_ff >= site.d_model]
    if not sites and not taken and not any(isinstance(module, MoELayer) for module in model.modules()):
        sites, loose = loose, []  # a model that is no stack
    left |= {site.path: "is not part of a stack of layers, as a head or a projector is not: name it by sites=" for site in loose}
    left |= {site.path: f"is narrower inside, {site.d_ff}, than the model, {site.d_model}: name it by sites=" for site in narrow}
    inner = [site.path for site in sites]
    return Survey(sites, [(n, r) for n, r in left.items() if not any(p == n or p.startswith(f"{n}.") for p in inner)])


def nearest(reasons: list[str]) -> str:
    """The first of the reasons that say most: what lies between the maps before how the module is built."""
    levels = ("it fails",), ("it has ", "its forward takes", "its input is", "its output is")
    return min(
        reasons, key=lambda one: 3 * ("one after the other" in one) or sum(n for n, level in enumerate(levels, 1) if one.startswith(level))
    )


def innermost(module: nn.Module, name: str) -> tuple[str, Network] | None:
    """Name and network of the module, or of the innermost one inside it that is a network by itself and has all its maps."""
    network = recognise(module)
    if isinstance(network, str):
        return None
    parts = set(maps_in(module).values())
    for child_name, child in module.named_children():
        if parts <= set(child.modules()) and (inner := innermost(child, f"{name}.{child_name}")) is not None:
            return inner
    return name, network


def misused(model: nn.Module, network: nn.Module) -> str | None:
    """Use that a module makes of the network and that an MoE layer could not serve, or None."""
    places = [(parent, child) for parent in model.modules() for child, part in parent._modules.items() if part is network]
    return next((reason for parent, child in places if (reason := misfit(type(parent), child)) is not None), None)


def whole(model: nn.Module, name: str, network: Network) -> Site:
    """The site of a network that is a module by itself, wherever the model has it."""
    module = model.get_submodule(name)
    places = [(parent, child) for parent in model.modules() for child, part in parent._modules.items() if part is module]

    def put_dropout(dropout: nn.Module) -> nn.Module:
        down, parts = network.down, list(module) if isinstance(module, nn.Sequential) else []
        if parts and parts[0] is network.up and down in parts:  # keeps the order of its parts
            kept = [part for part in parts if part is not network.inner]
            kept.insert(kept.index(down), dropout)
            for parent, child in places:
                setattr(parent, child, nn.Sequential(*kept).train(parent.training))
            return down
        return _insert(module, network, dropout)

    return _site(*places[0], network, name, put_dropout=put_dropout, places=tuple(places), final=network.final)


def in_block(block: nn.Module, name: str, found: Lying) -> Site:
    """The site of a network that lies in a block."""
    path = f"{name}.{found.place}".lstrip(".")

    def put(module: nn.Module) -> None:
        setattr(block, found.place, module.train(block.training))
        for holder, attribute, value in found.changes:
            setattr(holder, attribute, value.train(block.training) if isinstance(value, nn.Module) else value)

    def put_dropout(dropout: nn.Module) -> nn.Module:
        for holder, attribute, value in found.changes:
            if isinstance(value, float):
                setattr(holder, attribute, value)
        return _insert(block, found.network, dropout)

    return _site(block, found.place, found.network, path, put_dropout=put_dropout, put=put)


def _insert(module: nn.Module, network: Network, dropout: nn.Module) -> nn.Module:
    """Put a module in place of the hidden units' dropout, or before the last map."""
    old, new = network.down, nn.Sequential(dropout, network.down)
    if network.inner is not None and sum(part is network.inner for m in module.modules() for part in m.children()) == 1:
        old, new = network.inner, dropout
    holder, child = next((m, n) for m in module.modules() for n, part in m.named_children() if part is old)
    setattr(holder, child, new.train(module.training))
    return network.down


def _site(parent: nn.Module, child: str, network: Network, path: str, **more) -> Site:
    up, down = linear_map(network.up), linear_map(network.down)
    gate, bias_gate, weight, bias = None, None, up.weight, up.bias
    if network.gate is not None:
        gate, bias_gate = linear_map(network.gate)[:2]
    elif network.order is not None:
        of_gate, of_value = ORDERS[network.order]
        gate, weight = of_gate(up.weight), of_value(up.weight)
        bias_gate, bias = (None, None) if up.bias is None else (of_gate(up.bias), of_value(up.bias))
    return Site(
        parent, child, weight, bias, down.weight, down.bias, network.activation, network.dropout,
        gate=gate, bias_gate=bias_gate, path=path, channels_first=up.channels_first, **more,
    )  # fmt: skip


def pairs(module: nn.Module, parts: dict[str, nn.Module], done: set[nn.Module]) -> Iterator[tuple[str, str, bool]]:
    """Names of two maps of the module, in different children, that compose to D -> F -> D; and whether a pattern names them."""
    seen = set()
    for pattern in PATTERNS.values():
        names = pattern.get("up"), pattern.get("down")
        if "gate" not in pattern and all(name in parts and parts[name] not in done for name in names):
            seen.add(names)
            sizes = [sizes_of(parts[name]) for name in names]
            if None in sizes or fits(*sizes):
                yield (*names, True)
    children: dict[str, list[str]] = {}
    for name in parts:
        children.setdefault(name.split(".")[0], []).append(name)
    single = [names[0] for names in children.values() if len(names) == 1 and names[0].count(".") < 2]
    for up in single:
        for down in single:
            sizes = sizes_of(parts[up]), sizes_of(parts[down])
            if up == down or (up, down) in seen or not fits(*sizes) or parts[up] in done or parts[down] in done:
                continue
            if sizes[0][0] != sizes[1][0] or len(single) == 2:  # square maps are those of attention
                yield up, down, False


def _known(module: nn.Module) -> bool:
    """Return whether a pattern names the module's maps; nn.Sequential needs none."""
    parts = maps_in(module)
    return isinstance(module, nn.Sequential) or any(
        {pattern[role] for role in ("up", "down", "gate") if role in pattern} == set(parts) for pattern in PATTERNS.values()
    )


def _usual(site: Site, known: bool) -> bool:
    """Return whether a network is one of the model's own layers, not a head, a projector, or a bottleneck as in squeeze-and-excitation."""
    wide = site.d_ff >= site.d_model
    return (known and (wide or not site.channels_first)) or (wide and any(part.isdigit() for part in site.path.split(".")))


def _attention_like(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return hasattr(module, "is_causal") or "attent" in kind or "attn" in kind


def _candidate(module: nn.Module, parts: dict[str, nn.Module]) -> bool:
    """Return whether the module looks like a feed-forward network: by the sizes of its maps, of which no child has all."""
    sizes = [sizes_of(part) for part in parts.values()]
    whole_child = any(set(parts.values()) <= set(child.modules()) for child in module.children())
    wide = any(fits(one, other) and one[0] != other[0] for one in sizes for other in sizes if one is not other)
    return wide and not whole_child and not _attention_like(module)
