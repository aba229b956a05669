"""Conversion of a model's feed-forward networks to MoE layers, in place."""

from __future__ import annotations

import fnmatch
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from torch import nn

from smoe_dropout import hosts
from smoe_dropout.arguments import require_module
from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import moe_layers
from smoe_dropout.hosts.attention import attention_before, keep_past, keep_probabilities
from smoe_dropout.hosts.named import pattern_of
from smoe_dropout.hosts.original import Snapshot, base, dense_tensors, put_modules
from smoe_dropout.hosts.site import Site
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import Method, refused
from smoe_dropout.native.adoption import adopted_layers, described
from smoe_dropout.options import ConfigError, NoOptions, build_options, option_names, require, stored_options
from smoe_dropout.passes import watch_pass
from smoe_dropout.registry import CUTS, INTEGRATIONS, METHODS, ROUTERS, load
from smoe_dropout.shared import Shared


class ConversionWarning(UserWarning):
    """A conversion that does what it was told, and perhaps not what was meant."""


class Plan(NamedTuple):
    """Conversion that has been checked: its configuration, layers counted from 0; the layers' class; and index, FFN and configuration
    of each layer.

    needs: of layers and routers. attentions: the attention module before each layer, and embedding: the token embedding, where needed.
    left: names of modules that look like a network and are none, with the reasons.
    """

    config: SMoEConfig
    kind: type[MoELayer]
    indices: tuple[int, ...]
    sites: tuple[Site, ...]
    configs: tuple[SMoEConfig, ...]
    needs: frozenset[str]
    attentions: tuple[nn.Module | None, ...]
    embedding: nn.Module | None
    left: list[tuple[str, str]]


def moefy(model: nn.Module, config: SMoEConfig) -> nn.Module:
    """Replace feed-forward networks of `model` with MoE layers, in place, and return the model.

    `config.layers` selects networks by index, `config.sites` by module name; the others stay dense, and a second call may convert them,
    with the same or another configuration. New weights are drawn from torch's default generator. Build the optimiser afterwards, since the
    model's parameters change. `report(model, config)` says beforehand what is converted.

    Raises ConfigError, leaving the model untouched, if a layer index does not exist or names an MoE layer, E does not divide the FFN width,
    or a method or option does not apply. Warns (ConversionWarning) if experts start from random weights in place of trained ones that
    transformers has loaded, and if networks like the converted ones stay dense.
    """
    return install(model, config)


def install(model: nn.Module, config: SMoEConfig, cuts: bool = True) -> nn.Module:
    """`moefy`. cuts: False deals their neurons in order, whatever the configuration says.

    That is for models whose weights are loaded afterwards, in the order that they were saved in, and for `convert`, which cuts later.
    """
    if isinstance(model, nn.Module) and isinstance(config, SMoEConfig) and config.adopted is not None:
        return _adopted(model, config)
    plan = planned(model, config, cuts)
    config, dealt = plan.config, {} if cuts else {"cut": "contiguous", "shared_experts": 0}
    layers = [plan.kind(site.d_model, site.experts(replace(its, **dealt)), its) for site, its in zip(plan.sites, plan.configs, strict=True)]
    earlier = [layer for _, layer in moe_layers(model)]
    _number(layers, config, earlier)
    discarded = config.expert_init == "fresh" and any(is_loaded(site) for site in plan.sites)
    before = Snapshot(model)
    try:
        _place(plan, layers)
        watch_pass(model, [*earlier, *layers])
        for layer, places in zip(layers, before.remember(plan.sites), strict=True):
            layer.original = places
        _integrate(model, config)
        before.remember_hooks()
    except BaseException:
        before.restore()
        raise
    if discarded:
        _warn(
            f"the trained feed-forward networks of {type(model).__name__} were replaced by experts with random weights, the default: "
            f"to keep what they compute use SMoEConfig.exact({config.num_experts}), or expert_init = 'split' or 'copy'"
        )
    loading = layers[0].experts.bias_up.is_meta
    if not loading and config.layers is None and config.sites is None:
        alike = {pattern_of(site.path) for site in plan.sites}
        if missed := [(name, reason) for name, reason in plan.left if pattern_of(name) in alike]:
            _warn(
                f"{len(missed)} of {len(missed) + len(layers)} feed-forward networks of {type(model).__name__} stay dense, "
                f"such as {missed[0][0]!r}: {missed[0][1]}"
            )
    return model


def adopt(model: nn.Module, **changes: Any) -> nn.Module:
    """Turn the mixture-of-experts blocks that a model has of its own, such as Mixtral's, into MoE layers, in place, and return the model.

    They keep routers, experts, shared experts and k, and compute the same; any other k is possible afterwards, and whatever else MoE layers
    have. changes: fields of `SMoEConfig` that differ from those that describe the model, such as `balance_loss`. Build the optimiser
    afterwards, since the model's parameters change.

    Raises ConfigError, leaving the model untouched, for a model without such blocks, or with one that is not representable.
    """
    require_module(model)
    return moefy(model, SMoEConfig.from_dict({**asdict(described(model)), **changes}))


def _adopted(model: nn.Module, config: SMoEConfig) -> nn.Module:
    """`moefy` of a model's own experts. Its weights move one block at a time, so nothing is kept to take it back."""
    earlier, shared = [layer for _, layer in moe_layers(model)], Shared()
    layers = adopted_layers(model, config)
    _number(layers, config, earlier)
    for place, layer in enumerate(layers):
        layer.place(place, len(layers), shared, None)
    watch_pass(model, [*earlier, *layers])
    _integrate(model, config)
    return model


def _number(layers: Sequence[MoELayer], config: SMoEConfig, earlier: Sequence[MoELayer]) -> None:
    """Tell the layers of a conversion its configuration, the model's rather than the layer's own, and its number."""
    for layer in layers:
        layer.config = config
        layer.conversion = 1 + max((layer.conversion for layer in earlier), default=-1)


def _integrate(model: nn.Module, config: SMoEConfig) -> None:
    for library in INTEGRATIONS:
        if library in sys.modules:
            load(INTEGRATIONS, "integration", library).integrate(model, config)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, ConversionWarning, stacklevel=4)


def planned(model: nn.Module, config: SMoEConfig, cuts: bool = True) -> Plan:
    """Check a conversion without changing anything, and its cut unless that is done elsewhere. ConfigError as `moefy`."""
    require_module(model)
    if not isinstance(config, SMoEConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not an SMoEConfig: pass SMoEConfig(num_experts=16, top_k=8), for example")
    if config.adopted is not None:
        raise ConfigError(
            f"adopted = {config.adopted!r} is no conversion of dense networks: adopt(model) makes it, report(model) describes it"
        )
    method: Method | None = load(METHODS, "method", config.method) if config.method else None
    check(method, config)
    if cuts and config.cut != "contiguous":
        require(
            config.expert_init == "split", f"cut = {config.cut!r} has no effect with expert_init = {config.expert_init!r}: leave it out"
        )
        data = load(CUTS, "cut", config.cut).NEEDS_DATA
        require(not data, f"cut = {config.cut!r} needs calibration data: use convert(model, passes, cut={config.cut!r}) in place of moefy")
    kind = (method.layer if method else None) or MoELayer
    options = build_options(kind.Options, config.options, known=dict.fromkeys(config.options))
    config = replace(config, options=stored_options(options, config.options))
    networks, left = numbered(model, config.sites)
    indices = chosen(model, config, networks)
    if config.layers is not None:
        config = replace(config, layers=tuple(index % len(networks) for index in config.layers))
    kinds = [type(layer) for _, layer in moe_layers(model)]
    if kinds and (chained := [each.__name__ for each in (kind, *kinds) if not each.repeatable]):
        raise ConfigError(f"{chained[0]} passes a state from layer to layer, so all MoE layers of the model must be converted at once")
    sites = tuple(networks[index] for index in indices)
    refuse_tied(model, sites)
    config.require_layers(len(sites))
    for site, its in zip(sites, map(config.of_layer, range(len(sites))), strict=True):
        numbers = 3 * its.num_experts * (its.d_expert or -(-site.d_ff // its.num_experts)) * site.d_model
        if numbers >= 2**60:  # more than can be addressed
            raise ConfigError(f"num_experts = {its.num_experts} and d_expert = {its.d_expert} are experts of {numbers:.0e} parameters")
    needs = kind.needs | load(ROUTERS, "router", config.router).needs
    attentions = tuple(attention_before(model, site, "probabilities" in needs) if "attention" in needs else None for site in sites)
    embedding = token_embedding(model) if "tokens" in needs else None
    return Plan(config, kind, indices, sites, tuple(map(config.of_layer, range(len(sites)))), needs, attentions, embedding, left)


def numbered(model: nn.Module, patterns: str | tuple[str, ...] | None = None) -> tuple[list[Site | MoELayer], list[tuple[str, str]]]:
    """Feed-forward networks of the model before any conversion, in order: those that are left, and the layers that replaced the others.

    Also names of modules that look like one but are none, with the reasons.
    """
    converted = converted_networks(model)
    if patterns is not None and converted:
        given = (patterns,) if isinstance(patterns, str) else patterns
        names = [name for name, _ in model.named_modules() if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in given)]
        inside = {
            name: [each for each in converted if f"{each}.".startswith(f"{name}.")] for name in names
        }  # a block or the network itself
        left = tuple(name for name in names if not inside[name] and not any(name.startswith(f"{each}.") for each in converted))
        converted = {name: layer for name, layer in converted.items() if any(name in its for its in inside.values())}
        patterns = left if left or converted else patterns
    sites, left_over = [], []
    if patterns != ():
        try:
            sites, left_over = hosts.find(model, patterns)
        except ConfigError:
            if not converted:
                raise
    places = {module: place for place, module in enumerate(model.modules())}
    order = [(places[getattr(site.parent, site.name)], site) for site in sites] + [(places[layer], layer) for layer in converted.values()]
    return [network for _, network in sorted(order, key=lambda pair: pair[0])], left_over


def converted_networks(model: nn.Module) -> dict[str, MoELayer]:
    """MoE layers by the name of the network that they replaced, which may contain more than the layer, such as a dropout after it."""
    modules, found = dict(model.named_modules()), {}
    put = {value for module in modules.values() for value in put_modules(module)}
    for name, layer in moe_layers(model):
        outer = name
        while outer and modules[outer] not in put:
            outer = outer.rpartition(".")[0]
        found[outer or name] = layer
    return found


def chosen(model: nn.Module, config: SMoEConfig, networks: list[Site | MoELayer]) -> tuple[int, ...]:
    """Indices of the networks to convert, in order. ConfigError for one that does not exist, or was converted before."""
    count, kind = len(networks), type(model).__name__
    free = [index for index, network in enumerate(networks) if not isinstance(network, MoELayer)]
    if not free:
        raise ConfigError(f"all {count} feed-forward networks of {kind} are MoE layers already")
    if config.layers is None:
        if len(free) < count:
            listed = ", ".join(str(index) for index in range(count) if index not in free)
            raise ConfigError(f"layers {listed} of {kind} are MoE layers already: name those to convert, such as layers = {tuple(free)}")
        return tuple(free)
    if outside := [index for index in config.layers if not -count <= index < count]:
        raise ConfigError(f"layers names {outside}, but {kind} has layers 0 to {count - 1}")
    indices = sorted(index % count for index in config.layers)
    if twice := [index for index in set(indices) if indices.count(index) > 1]:
        raise ConfigError(f"layers = {config.layers} names layer {twice[0]} of {count} twice")
    if again := [index for index in indices if index not in free]:
        raise ConfigError(f"layers names {again}, which are MoE layers already: {kind} has {free} left")
    return tuple(indices)


def _place(plan: Plan, layers: list[MoELayer]) -> None:
    """Put the layers into the model, and connect them with what they need of it."""
    shared = Shared()
    for place, (site, layer, attention) in enumerate(zip(plan.sites, layers, plan.attentions, strict=True)):
        layer.place(place, len(layers), shared, attention)
        site.replace(layer)
        if "attention" in plan.needs:
            keep_past(attention)
        if "probabilities" in plan.needs:
            keep_probabilities(attention, shared, place)
    if plan.embedding is not None:
        plan.embedding.register_forward_pre_hook(shared.see_tokens, with_kwargs=True)


def is_loaded(site: Site) -> bool:
    """Test whether transformers has read the network's weights from a file and marked them so; False for other models."""
    return getattr(base(site.up), "_is_hf_initialized", False)


def check(method: Method | None, config: SMoEConfig) -> None:
    """Raise ConfigError for an option that neither method nor router has, or a configuration that the method cannot take."""
    router = load(ROUTERS, "router", config.router)
    for name, given in (
        ("balance_loss", config.balance_loss),
        ("gate_weight", config.gate_weight != "softmax"),
        ("shared_experts", config.shared_experts),
    ):
        if given and name not in router.uses:
            raise ConfigError(f"{name} = {getattr(config, name)!r} has no effect with router {config.router!r}: leave it out")
    kinds = [method.options] if method else []
    if config.options:
        kinds.append(router.Options)
    known = option_names(kinds)
    for kind in kinds or [NoOptions]:
        build_options(kind, config.options, known)
    if method and config.shared_experts:
        raise ConfigError(
            f"shared_experts = {config.shared_experts} cannot be combined with method = {method.name!r}, which routes by itself"
        )
    if sentence := refused(method, config):
        raise ConfigError(sentence)
    if method and method.layer is None:
        raise ConfigError(
            f"method = {method.name!r} has no layer of its own and would have no effect here: leave it out and set what it stands for, "
            f"{', '.join(f'{name} = {value!r}' for name, value in method.flags.items())} as flags of train.py"
        )


def refuse_tied(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise ConfigError if another module has a weight of a network, too: experts would silently untie them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # a module that the model uses in several places is named once
        for own, parameter in module.named_parameters(name, recurse=False):
            names.setdefault(id(parameter), []).append(own)
    for tensor in (tensor for site in sites for tensor in dense_tensors(site).values()):
        if len(tied := names.get(id(base(tensor)), [])) > 1:
            raise ConfigError(f"{' and '.join(tied[:2])} are the same parameter, and converting would untie them: untie them first")


def token_embedding(model: nn.Module) -> nn.Module:
    """The model's input embedding: `get_input_embeddings()` if it has that, else its first nn.Embedding. ConfigError without one."""
    if callable(getter := getattr(model, "get_input_embeddings", None)):
        return getter()
    found = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no token embedding, and this router routes by token ids")
    return found
