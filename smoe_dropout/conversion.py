"""Turning the feed-forward networks of a model into MoE layers, in place."""

from __future__ import annotations

from torch import nn

from smoe_dropout.config import ConfigError, SMoEConfig
from smoe_dropout.hf.adopt import adopt, is_pretrained_model
from smoe_dropout.hosts import find_sites
from smoe_dropout.hosts.attention import attention_before, keep_probabilities
from smoe_dropout.hosts.site import Site
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import Method, refused
from smoe_dropout.options import NoOptions, build_options, option_names
from smoe_dropout.registry import METHODS, ROUTERS, load
from smoe_dropout.routers import Shared


def moefy(model: nn.Module, config: SMoEConfig) -> nn.Module:
    """Replaces feed-forward networks of `model` by MoE layers, in place, and returns it.

    `config.layers` picks them by index; the others stay dense. New weights are drawn from torch's default generator. The model's
    parameters change: build its optimiser afterwards. ConfigError for a model already turned, a layer index it does not have, a width
    that E does not divide, or a method or option that cannot be here; the model is then untouched.
    """
    if not isinstance(config, SMoEConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not an SMoEConfig")
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} has MoE layers already")
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
        layer.config = config  # the model's
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
    if is_pretrained_model(model):
        adopt(model, config)
    return model


def check(method: Method | None, config: SMoEConfig) -> None:
    """ConfigError for an option that neither the method nor the router has, or a configuration that the method cannot take."""
    router = load(ROUTERS, "router", config.router)
    for name, given in (("balance_loss", config.balance_loss), ("gate_weight", config.gate_weight != "softmax")):
        if given and name not in router.uses:
            raise ConfigError(f"{name} = {getattr(config, name)!r} means nothing to router {config.router!r}: leave it out")
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
            f"method = {method.name!r} has no layer of its own and would do nothing here: leave it out, and choose what it stands for, "
            f"{', '.join(f'{name} = {value!r}' for name, value in method.flags.items())} in the terms of train.py"
        )


def refuse_tied(model: nn.Module, site: Site) -> None:
    """ConfigError where a weight of the network is also another module's: experts would silently part them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tensor in (site.up, site.bias_up, site.down, site.bias_down, site.gate, site.bias_gate):
        parameter = tensor if tensor is None or tensor._base is None else tensor._base  # Conv1D's is a view
        if len(tied := names.get(id(parameter), [])) > 1:
            raise ConfigError(f"{' and '.join(tied[:2])} are one and the same parameter, which experts would part: untie them first")


def token_embedding(model: nn.Module) -> nn.Module:
    """What the host looks token ids up in: its input embedding, or else its first nn.Embedding. ConfigError if there is none."""
    if callable(getter := getattr(model, "get_input_embeddings", None)):
        return getter()
    found = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no token embedding, and this router routes by token ids")
    return found
