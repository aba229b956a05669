"""Report of what a conversion does to a model, before it and after it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import require_module
from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import conversions, moe_layers
from smoe_dropout.conversion import converted_networks, numbered, planned
from smoe_dropout.hosts import find_sites, why_not
from smoe_dropout.hosts.original import base, dense_tensors
from smoe_dropout.hosts.site import Site
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import ROUTERS, load


@dataclass(frozen=True)
class Network:
    """One feed-forward network.

    index: as in `SMoEConfig.layers`; None if that does not count it. width: hidden units; None if it is not known any more.
    reason: why it stays dense; "" if it is converted. experts, d_expert, k: of the MoE layer; 0 if it stays dense.
    dense_parameters, dense_flops: of the dense network. parameters: of the MoE layer with its router, or of the network that stays, and
    active: those of them used for a token at k. flops: per token at k, matrix products only, two operations a multiply-add.
    """

    name: str
    index: int | None
    d_model: int
    width: int | None
    activation: str
    reason: str
    experts: int
    d_expert: int
    k: int
    dense_parameters: int | None
    parameters: int
    active: int
    dense_flops: int | None
    flops: int

    @property
    def converted(self) -> bool:
        """Return whether the network is, or would be, an MoE layer."""
        return not self.reason

    @property
    def tower(self) -> str:
        """Name of the stack of layers that the network is in: its dotted name up to the first number."""
        parts = self.name.split(".")
        ends = [place for place, part in enumerate(parts) if part.isdigit()] or [len(parts) - 1]
        return ".".join(parts[: ends[0]])

    @property
    def sizes(self) -> str:
        """Everything that equal networks of a stack share, in words."""
        fate = f"{self.experts} experts of {self.d_expert}, {self.k} active" if self.converted else f"stays dense, {self.reason}"
        return f"{self.d_model} -> {'?' if self.width is None else self.width} -> {self.d_model}, {self.activation}: {fate}"


@dataclass(frozen=True)
class Report:
    """Account of a conversion, planned or done; `str` gives it in a few lines.

    done: whether the model is converted. refusal: the sentence with which `moefy` would refuse, or None. networks: all feed-forward
    networks found, in order. left: names of modules that look like one and are none for `moefy`, with the reasons. conversions: one for
    each call of `moefy`. parameters_before, parameters_after: of the whole model; before is None if it is not known any more. trained,
    stored: by "experts", "routers" and "other", the number of trained parameters and of all, after the conversion.
    """

    model: str
    done: bool
    refusal: str | None
    networks: tuple[Network, ...]
    left: tuple[tuple[str, str], ...]
    conversions: tuple[SMoEConfig, ...]
    parameters_before: int | None
    parameters_after: int
    trained: dict[str, int]
    stored: dict[str, int]

    @property
    def converted(self) -> tuple[Network, ...]:
        """Networks that are, or would be, MoE layers."""
        return tuple(network for network in self.networks if network.converted)

    @property
    def towers(self) -> dict[str, tuple[int, int]]:
        """Numbers of converted and of all networks, by stack of layers."""
        names = dict.fromkeys(network.tower for network in self.networks)
        return {name: tuple(sum(n.tower == name for n in some) for some in (self.converted, self.networks)) for name in names}

    def total(self, quantity: str, only_converted: bool = False) -> int | None:
        """Sum of a field over all networks, such as "active"; None if it is not known for one."""
        values = [getattr(network, quantity) for network in (self.converted if only_converted else self.networks)]
        return None if None in values else sum(values)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        verb = "converted" if self.done else "to be converted"
        yield f"{self.model}: {len(self.converted)} of {len(self.networks)} feed-forward networks {verb}"
        if self.refusal:
            yield f"  moefy refuses: {self.refusal}"
        for tower, (some, whole) in self.towers.items():
            yield f"  {tower or 'the model'}: {some} of {whole}"
            for names, sizes in _grouped((n.name, n.sizes) for n in self.networks if n.tower == tower):
                yield f"    {names}: {sizes}"
        for names, reason in _grouped(self.left):
            yield f"  {names} stays as it is: {reason}"
        if self.refusal or not self.networks:
            return
        ks = sorted({network.k for network in self.converted})
        at = f" at k = {', '.join(map(str, ks))}" if ks else ""
        yield f"parameters: {_change(self.parameters_before, self.parameters_after)}"
        inside = _change(self.total("dense_parameters"), self.total("parameters"))
        yield f"  in feed-forward networks: {inside}; per token{at}: {self.total('active'):,}"
        before, after = self.total("dense_flops"), self.total("flops")
        share = f" ({after / before:.0%})" if before else ""
        yield f"FLOPs of feed-forward networks per token{at}: {_change(before, after)}{share}"
        for config in self.conversions:
            yield f"experts from moefy: {_settings(config)}"
        parts = [f"{kind} {self.trained[kind]:,} of {count:,}" for kind, count in self.stored.items() if count]
        yield f"trained parameters: {', '.join(parts)}"


def report(model: nn.Module, config: SMoEConfig | None = None) -> Report:
    """Account of what `moefy(model, config)` would do, or without a configuration of what was done to the model.

    Changes nothing, draws no random numbers and allocates no weights, so it also works on the meta device. A conversion that `moefy`
    refuses is reported with its sentence as `refusal`. Raises ConfigError for something that is not a model or a configuration.
    """
    require_module(model)
    if config is not None and not isinstance(config, SMoEConfig):
        raise ConfigError(f"config is a {type(config).__name__}, not an SMoEConfig: leave it out to report what was done")
    refusal, networks, plan, layers = None, [], None, {}
    try:
        networks, _ = numbered(model, config.sites if config else None)
        if config is not None:
            plan = planned(model, config)
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                for index, site, its in zip(plan.indices, plan.sites, plan.configs, strict=True):
                    layers[index] = plan.kind(site.d_model, _on_meta(site).experts(its), its)
    except ConfigError as error:
        refusal, layers = str(error), {}
    found = [
        _sparse(name, index, network, {key: place.size for key, place in (network.original or {}).items()})
        if isinstance(network, MoELayer)
        else _sparse(name, index, layers[index], {key: tuple(tensor.shape) for key, tensor in dense_tensors(network).items()})
        if index in layers
        else _dense(name, index, network, "not converted" if config is None else "moefy refuses" if refusal else "not named in layers")
        for index, (name, network) in enumerate(zip(_names(model, networks), networks, strict=True))
    ]
    if config is not None and config.sites is not None:
        found += _unmatched(model, {network.name for network in found})
    made = [*(layer for _, layer in moe_layers(model)), *layers.values()]
    gone = [base(tensor) for index in layers for tensor in dense_tensors(networks[index]).values()]
    experts = [parameter for layer in made for parameter in layer.experts.parameters()]
    routers = [parameter for layer in made for parameter in layer.routing_parameters()]
    parameters = [*model.parameters(), *(parameter for layer in made for parameter in layer.parameters())]
    kinds = {"experts": experts, "routers": routers, "other": _without(parameters, [*gone, *experts, *routers])}
    stored = {kind: _count(parameters) for kind, parameters in kinds.items()}
    dense = [network.dense_parameters for network in found if network.converted]
    return Report(
        model=type(model).__name__,
        done=config is None,
        refusal=None if config is None else refusal,
        networks=tuple(found),
        left=tuple((name, reason) for name, reason in why_not(model) if not any(f"{its.name}.".startswith(f"{name}.") for its in found)),
        conversions=tuple(conversions(model)) + (() if config is None else (plan.config if plan else config,)),
        parameters_before=None if None in dense else stored["other"] + sum(dense),
        parameters_after=sum(stored.values()),
        trained={kind: _count(parameter for parameter in its if parameter.requires_grad) for kind, its in kinds.items()},
        stored=stored,
    )


def _sparse(name: str, index: int, layer: MoELayer, dense: dict[str, tuple[int, ...]]) -> Network:
    """An MoE layer, given the shapes of the maps of the network that it replaces."""
    E, H, D = layer.experts.down.shape
    one, experts = layer.experts.up[0].numel() + layer.experts.down[0].numel(), _count(layer.experts.parameters())
    parameters, k = _count(layer.parameters()), min(layer.computed_experts, E)
    width, stored, flops = dense["up"][0] if dense else None, sum(map(math.prod, dense.values())), _flops(dense)
    active, k_flops = parameters - experts * (E - k) // E, 2 * one * k + layer.routing_flops(1, 1)
    sizes = (E, H, layer.top_k, stored if dense else None, parameters, active, flops if dense else None, k_flops)
    return Network(name, index, D, width, layer.experts.activation, "", *sizes)


def _dense(name: str, index: int | None, site: Site, reason: str) -> Network:
    """A network that stays."""
    shapes = {key: tuple(tensor.shape) for key, tensor in dense_tensors(site).items()}
    stored, flops = sum(map(math.prod, shapes.values())), _flops(shapes)
    return Network(name, index, site.d_model, site.d_ff, site.activation, reason, 0, 0, 0, stored, stored, stored, flops, flops)


def _flops(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values() if len(shape) == 2)


def _names(model: nn.Module, networks: list[Site | MoELayer]) -> list[str]:
    modules = {module: name for name, module in model.named_modules()}
    layers = {layer: name for name, layer in converted_networks(model).items()}
    return [layers[each] if isinstance(each, MoELayer) else modules[getattr(each.parent, each.name)] for each in networks]


def _unmatched(model: nn.Module, matched: set[str]) -> list[Network]:
    """Networks that would be found without `sites`, and that its patterns do not match."""
    try:
        sites = find_sites(model)
    except ConfigError:
        return []
    named = zip(_names(model, sites), sites, strict=True)
    return [_dense(name, None, site, "not matched by sites") for name, site in named if name not in matched]


def _on_meta(site: Site) -> Site:
    return dataclasses.replace(site, **{name: tensor.to("meta") for name, tensor in dense_tensors(site).items()})


def _count(parameters: Iterable[Tensor]) -> int:
    return sum({id(parameter): parameter.numel() for parameter in list(parameters)}.values())


def _without(parameters: Iterable[Tensor], others: list[Tensor]) -> list[Tensor]:
    excluded = {id(parameter) for parameter in others}
    return [parameter for parameter in parameters if id(parameter) not in excluded]


def _grouped(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Names that differ in their first number only, and have equal texts, as one: layers.0-23.mlp."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, text in pairs:
        number = re.search(r"(?<![^.])\d+(?![^.])", name)
        pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        groups.setdefault((pattern, text), []).extend([] if number is None else [int(number.group())])
    for (pattern, text), numbers in groups.items():
        yield pattern.replace("{}", _ranges(numbers)), text


def _ranges(numbers: list[int]) -> str:
    """The numbers with runs shortened: 0-3, 5."""
    runs = [[number for _, number in run] for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _change(before: int | None, after: int) -> str:
    return f"{'?' if before is None else format(before, ',')} -> {after:,}"


def _settings(config: SMoEConfig) -> str:
    """A conversion in words."""
    router = load(ROUTERS, "router", config.router)
    frozen = router.frozen_by_default if config.freeze_router is None else config.freeze_router
    parts = [
        *([] if config.layers is None else [f"layers {', '.join(map(str, config.layers))}"]),
        *([] if config.sites is None else [f"sites {config.sites!r}"]),
        f"router {config.router}{', frozen' if frozen else ''}",
        *([f"{config.gate_weight} weights"] if "gate_weight" in router.uses else []),
        f"output scale {config.output_scale}",
        f"{config.expert_init} at the start",
        *([f"method {config.method}"] if config.method else []),
        *(f"{name} = {value}" for name, value in config.options.items()),
    ]
    return ", ".join(parts)
