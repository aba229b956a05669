"""Where the feed-forward networks of an architecture are, and how to replace them in place.

A host is a module with `find(model) -> list[Site]` and a line in `registry.HOSTS`. The residual, its dropout and the LayerNorm stay the
model's own.
"""

from __future__ import annotations

from torch import nn

from smoe_dropout.hosts.named import described, find_named
from smoe_dropout.hosts.site import Site
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import HOSTS, load


def find_sites(model: nn.Module, patterns: str | tuple[str, ...] | None = None) -> list[Site]:
    """The model's feed-forward networks in order: the modules matching `patterns`, or those that any registered host finds.

    Raises ConfigError if there are none, with patterns that would match some; for a pattern that matches something else; and for a network
    used in several places of the model.
    """
    if patterns is not None:
        sites = find_named(model, patterns)
    else:
        places = {module: place for place, module in enumerate(model.modules())}
        found = [site for host in HOSTS for site in load(HOSTS, "host", host).find(model)]
        sites = sorted(found, key=lambda site: places[getattr(site.parent, site.name)])
    networks = {getattr(site.parent, site.name) for site in sites}
    for network in networks:
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is network]
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names[:2])} are the same feed-forward network, which cannot become experts")
    if sites:
        return sites
    raise ConfigError(
        f"none of the hosts ({', '.join(HOSTS)}) finds a feed-forward network in {type(model).__name__}, such as "
        f"nn.Sequential(Linear, activation, [Dropout], Linear); {described(model)}"
    )


def sites_in_blocks(model: nn.Module, blocks: int, patterns: str | tuple[str, ...] | None = None) -> list[Site]:
    """Like `find_sites`, for methods that drop blocks of hidden units. ConfigError if `blocks` does not divide a width."""
    sites = find_sites(model, patterns)
    for site in sites:
        if site.d_ff % blocks:
            raise ConfigError(f"option blocks = {blocks} does not divide the feed-forward width {site.d_ff}")
    return sites
