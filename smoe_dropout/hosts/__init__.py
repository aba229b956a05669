"""Where the feed-forward networks of an architecture are, and how they become MoE layers in place.

A host is a module with `find(model) -> list[Site]`. The residual, its dropout and the LayerNorm stay the host's own.
"""

from __future__ import annotations

import importlib

from torch import nn

from smoe_dropout.config import ConfigError
from smoe_dropout.hosts.named import described, find_named
from smoe_dropout.hosts.site import Site

HOSTS = tuple(f"{__name__}.{name}" for name in ("torch_layers", "sequential", "intermediate_output", "conv1d", "gated"))


def find_sites(model: nn.Module, patterns: str | tuple[str, ...] | None = None) -> list[Site]:
    """The model's feed-forward networks in order: the modules that `patterns` name, or those that any host knows.

    ConfigError if there are none, with the patterns that would name some; for a pattern that names something else; or for a network that
    stands in several places of the model.
    """
    if patterns is not None:
        sites = find_named(model, patterns)
    else:
        places = {module: place for place, module in enumerate(model.modules())}
        found = [site for module in HOSTS for site in importlib.import_module(module).find(model)]
        sites = sorted(found, key=lambda site: places[getattr(site.parent, site.name)])
    networks = {getattr(site.parent, site.name) for site in sites}
    for network in networks:
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is network]
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names[:2])} are one and the same feed-forward network, which cannot become experts")
    if sites:
        return sites
    raise ConfigError(
        f"{type(model).__name__} has no feed-forward network a host knows, such as nn.Sequential(Linear, activation, [Dropout], Linear); "
        f"{described(model)}"
    )


def sites_in_blocks(model: nn.Module, blocks: int, patterns: str | tuple[str, ...] | None = None) -> list[Site]:
    """The model's feed-forward networks, for a method that drops blocks of hidden units. ConfigError if a width is not that many blocks."""
    sites = find_sites(model, patterns)
    for site in sites:
        if site.d_ff % blocks:
            raise ConfigError(f"option blocks = {blocks} does not divide the feed-forward width {site.d_ff}")
    return sites
