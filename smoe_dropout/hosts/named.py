"""Feed-forward networks selected by module name: `SMoEConfig(sites="encoder.layers.*.mlp")`."""

import fnmatch
import itertools
import re

from torch import nn

from smoe_dropout.hosts.blocks import Lying, lying
from smoe_dropout.hosts.network import Network, maps_in, recognise
from smoe_dropout.hosts.site import Site
from smoe_dropout.hosts.structure import in_block, nearest, pairs, survey, whole
from smoe_dropout.native import native_blocks
from smoe_dropout.options import ConfigError


def find_named(model: nn.Module, patterns: str | tuple[str, ...]) -> list[Site]:
    """Sites of the modules whose dotted names match a pattern (fnmatch; `*` also matches dots), in the model's order.

    Such a module is a feed-forward network, or a block in which exactly one lies. Raises ConfigError for a pattern without match, nested
    matches, a module that is neither, and one inside a mixture of experts.
    """
    patterns, found = (patterns,) if isinstance(patterns, str) else patterns, {}
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not (matched := fnmatch.filter(names, pattern)):
            raise ConfigError(f"sites = {pattern!r} matches no module of {type(model).__name__}; {listed(model)}")
        found |= dict.fromkeys(matched)
    chosen = [name for name in names if name in found]
    for outer, inner in itertools.permutations(chosen, 2):
        if inner.startswith(f"{outer}."):
            raise ConfigError(f"sites matches both {outer!r} and {inner!r} inside it: name one of them")
    for (block, _), name in itertools.product(native_blocks(model), chosen):
        if f"{name}.".startswith(f"{block}."):
            raise ConfigError(f"sites matches {name!r} in {block!r}, which is a mixture of experts already: use smoe_dropout.adopt(model)")
    return [_site(model, name) for name in chosen]


def _site(model: nn.Module, name: str) -> Site:
    module = model.get_submodule(name)
    network = recognise(module)
    if isinstance(network, Network):
        return whole(model, name, network)
    lie = [lying(module, up, down) for up, down, _ in pairs(module, maps_in(module), set())]
    if len(inside := [one for one in lie if isinstance(one, Lying)]) == 1:
        return in_block(module, name, inside[0])
    reason = nearest([*(one for one in lie if isinstance(one, str)), network])
    raise ConfigError(f"sites matches {name!r}, a {type(module).__name__}, which is not a feed-forward network: {reason}; {listed(model)}")


def listed(model: nn.Module) -> str:
    """Sentence listing patterns that match the model's feed-forward networks, or stating that there are none."""
    if isinstance(recognise(model), Network):
        return f"{type(model).__name__} is itself a feed-forward network: pass moefy the model that contains it"
    sites = survey(model, set()).sites
    if not sites:
        return "none of its modules computes exactly down(activation(up x))"
    sizes = grouped((site.path, f"{site.d_model} -> {site.d_ff} -> {site.d_model}") for site in sites)
    return f"patterns of feed-forward networks for sites=: {sizes}"


def grouped(named) -> str:
    """Names with something said of them, those that differ only in numbers as one pattern."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, said in named:
        groups.setdefault((re.sub(r"\b\d+\b", "*", name), said), []).append(name)
    return ", ".join(
        f"{pattern!r} ({len(names)} modules, {said})" if len(names) > 1 else f"{names[0]!r} (1 module, {said})"
        for (pattern, said), names in groups.items()
    )
