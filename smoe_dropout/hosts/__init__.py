"""Where the feed-forward networks of a model are, and how to replace them in place.

They are found by structure and verified by running parts of the model on random numbers: `survey`. `registry.PATTERNS` names layouts, and a
host, a module with `find(model) -> list[Site]` and a line in `registry.HOSTS`, finds what cannot be found in this way. The residual, its
dropout and the LayerNorm stay the model's own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from smoe_dropout.hosts.named import find_named, grouped
from smoe_dropout.hosts.network import Network, recognise
from smoe_dropout.hosts.site import Site
from smoe_dropout.hosts.structure import Survey, survey
from smoe_dropout.native import native_blocks
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import HOSTS, load

ALREADY_SPARSE = "is a mixture of experts already: use smoe_dropout.adopt(model)"


def find_sites(model: nn.Module, patterns: str | tuple[str, ...] | None = None) -> list[Site]:
    """The model's feed-forward networks in order: the modules matching `patterns`, or all that are found.

    Raises ConfigError if there are none, with the reason for the nearest candidates; for a model that is a mixture of experts already; and
    for a pattern that matches something else.
    """
    return find(model, patterns).sites


def find(model: nn.Module, patterns: str | tuple[str, ...] | None = None) -> Survey:
    """Like `find_sites`, with the modules that look like feed-forward networks and are none; without these if there are `patterns`."""
    with torch.device("cpu"):  # whatever the caller's default is
        return Survey(find_named(model, patterns), []) if patterns is not None else _found(model)


def _found(model: nn.Module) -> Survey:
    if blocks := native_blocks(model):
        raise ConfigError(f"{type(model).__name__} {ALREADY_SPARSE} ({grouped((n, type(b).__name__) for n, b in blocks)})")
    found = _surveyed(model)
    if found.sites:
        return found
    if isinstance(recognise(model), Network):
        raise ConfigError(f"{type(model).__name__} is itself a feed-forward network: pass moefy the model that contains it")
    nearest = f"nearest: {grouped(found.left)}" if found.left else "none of its modules has maps D -> F -> D with an activation between"
    raise ConfigError(
        f"nothing finds a feed-forward network in {type(model).__name__}, that is down(activation(up x)) or its gated form; {nearest}"
    )


def why_not(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the modules that look like feed-forward networks and are left as they are, each with the reason."""
    blocks = [(name, f"{type(block).__name__} {ALREADY_SPARSE}") for name, block in native_blocks(model)]
    with torch.device("cpu"):
        return blocks + _surveyed(model).left


def _surveyed(model: nn.Module) -> Survey:
    """Networks that registered hosts and the survey of all other modules find, in the model's order."""
    names = {module: name for name, module in model.named_modules()}
    hosted = [site for host in HOSTS for site in load(HOSTS, "host", host).find(model)]
    hosted = [replace(site, path=site.path or f"{names[site.parent]}.{site.name}".lstrip(".")) for site in hosted]
    taken = {part for site in hosted for part in (site.parent if site.put else getattr(site.parent, site.name)).modules()}
    taken |= {part for _, block in native_blocks(model) for part in block.modules()}
    found = survey(model, taken)
    order = {name: place for place, name in enumerate(names.values())}
    return Survey(sorted([*hosted, *found.sites], key=lambda site: order[site.path]), found.left)


def sites_in_blocks(model: nn.Module, blocks: int, patterns: str | tuple[str, ...] | None = None) -> list[Site]:
    """Like `find_sites`, for methods that drop blocks of hidden units. ConfigError if `blocks` does not divide a width."""
    sites = find_sites(model, patterns)
    for site in sites:
        if site.d_ff % blocks:
            raise ConfigError(f"option blocks = {blocks} does not divide the feed-forward width {site.d_ff}")
    return sites
