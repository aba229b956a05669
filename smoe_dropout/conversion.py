"""Conversion of a model's feed-forward networks to MoE layers, in place."""

from __future__ import annotations

import sys

from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.hosts import find_sites
from smoe_dropout.hosts.attention import attention_before, keep_probabilities
from smoe_dropout.hosts.site import Site
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import Method, refused
from smoe_dropout.options import ConfigError, NoOptions, build_options, option_names
from smoe_dropout.registry import INTEGRATIONS, METHODS, ROUTERS, load
from smoe_dropout.shared import Shared


def moefy(model: nn.Module, config: SMoEConfig) -> nn.Module:
    """Replace feed-forward networks of `model` with MoE layers, in place, and return the model.

    `config.layers` selects networks by index, `config.sites` by module name; the others stay dense. New weights are drawn from torch's
    default generator. Build the optimiser afterwards, since the model's parameters change.

    Raises ConfigError, leaving the model untouched, if it already has MoE layers, a layer index does not exist, E does not divide the FFN
    width, or a method or option does not apply.
    """
    if not isinstance(config, SMoEConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not an SMoEConfig")
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} already has MoE layers")
    method: Method | None = load(METHODS, "method", config.method) if config.method else None
    check(method, config)
    kind = (method.layer if method else None) or MoELayer
    sites = find_sites(model, config.sites)
    chosen = range(len(sites)) if config.layers is None else sorted(config.layers)
    if outside := [index for index in chosen if index >= len(sites)]:
        raise ConfigError(f"layers names {outside}, but {type(model).__name__} has layers 0 to {len(sites) - 1}")
    for index in chosen:
        refuse_tied(model, sites[index])
    if config.experts_by_layer is not None and len(config.experts_by_layer) != len(chosen):
        raise ConfigError(f"experts_by_layer = {config.experts_by_layer} must give a number for each of the {len(chosen)} MoE layers")
    own = [config.of_layer(place) for place in range(len(chosen))]
    layers = [kind(sites[index].d_model, sites[index].experts(its), its) for index, its in zip(chosen, own, strict=True)]
    for layer in layers:
        layer.config = config  # the model's, not the layer's own
    needs, shared = kind.needs | layers[0].router.needs, Shared()
    attentions = [attention_before(model, sites[index], "probabilities" in needs) if "attention" in needs else None for index in chosen]
    embedding = token_embedding(model) if "tokens" in needs else None
    for place, (index, layer) in enumerate(zip(chosen, layers, strict=True)):
        layer.place(place, len(layers), shared, attentions[place])
        sites[index].replace(layer)
        if "probabilities" in needs:
            keep_probabilities(attentions[place])
    if embedding is not None:
        embedding.register_forward_pre_hook(shared.see_tokens, with_kwargs=True)
    for library in INTEGRATIONS:
        if library in sys.modules:
            load(INTEGRATIONS, "integration", library).integrate(model, config)
    return model


def check(method: Method | None, config: SMoEConfig) -> None:
    """Raise ConfigError for an option that neither method nor router has, or a configuration that the method cannot take."""
    router = load(ROUTERS, "router", config.router)
    for name, given in (("balance_loss", config.balance_loss), ("gate_weight", config.gate_weight != "softmax")):
        if given and name not in router.uses:
            raise ConfigError(f"{name} = {getattr(config, name)!r} has no effect with router {config.router!r}: leave it out")
    kinds = [method.options] if method else []
    if config.options:
        kinds.append(router.Options)
    known = option_names(kinds)
    for kind in kinds or [NoOptions]:
        build_options(kind, config.options, known)
    if sentence := refused(method, config):
        raise ConfigError(sentence)
    if method and method.layer is None:
        raise ConfigError(
            f"method = {method.name!r} has no layer of its own and would have no effect here: leave it out and set what it stands for, "
            f"{', '.join(f'{name} = {value!r}' for name, value in method.flags.items())} as flags of train.py"
        )


def refuse_tied(model: nn.Module, site: Site) -> None:
    """Raise ConfigError if a weight of the network is shared with another module: experts would silently untie them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tensor in (site.up, site.bias_up, site.down, site.bias_down, site.gate, site.bias_gate):
        parameter = tensor if tensor is None or tensor._base is None else tensor._base  # Conv1D's weight is a view
        if len(tied := names.get(id(parameter), [])) > 1:
            raise ConfigError(f"{' and '.join(tied[:2])} are the same parameter, and converting would untie them: untie them first")


def token_embedding(model: nn.Module) -> nn.Module:
    """The model's input embedding: `get_input_embeddings()` if it has that, else its first nn.Embedding. ConfigError without one."""
    if callable(getter := getattr(model, "get_input_embeddings", None)):
        return getter()
    found = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no token embedding, and this router routes by token ids")
    return found
