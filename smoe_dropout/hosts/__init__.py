"""Where the feed-forward networks of an architecture are, and how they become MoE layers in place.

A host is a module with `find(model) -> list[Site]`. The residual, its dropout and the LayerNorm stay the host's own.
"""

import importlib

from torch import nn

from smoe_dropout.config import ConfigError, SMoEConfig
from smoe_dropout.hosts.site import Site
from smoe_dropout.layer import MoELayer

HOSTS = ("smoe_dropout.hosts.sequential",)


def find_sites(model: nn.Module) -> list[Site]:
    """The model's feed-forward networks in order, by the first host that knows any. ConfigError if none does."""
    for module in HOSTS:
        if sites := importlib.import_module(module).find(model):
            return sites
    raise ConfigError(
        f"{type(model).__name__} has no feed-forward network a host knows, such as nn.Sequential(Linear, activation, [Dropout], Linear)"
    )


def moefy(model: nn.Module, config: SMoEConfig) -> nn.Module:
    """Replaces feed-forward networks of `model` by MoE layers, in place, and returns it.

    `config.layers` picks them by index; the others stay dense. New weights are drawn from torch's default generator. The model's
    parameters change: build its optimiser afterwards. ConfigError for a model already turned, a layer index it does not have, or a width
    that E does not divide; the model is then untouched.
    """
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} has MoE layers already")
    sites = find_sites(model)
    chosen = range(len(sites)) if config.layers is None else config.layers
    if outside := [index for index in chosen if index >= len(sites)]:
        raise ConfigError(f"layers names {outside}, but {type(model).__name__} has layers 0 to {len(sites) - 1}")
    replacements = [(sites[index], sites[index].experts(config)) for index in chosen]
    for site, experts in replacements:
        site.replace(MoELayer(site.d_model, experts, config))
    return model
