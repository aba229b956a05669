"""Feed-forward networks selected by module name, for unsupported architectures: `SMoEConfig(sites="encoder.layers.*.mlp")`.

Whether a module is one is determined by running it on a few random inputs with random weights and comparing the output with
down(act(up x)), or down(act(gate x) * up x), for every activation that experts support.
"""

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.hosts.site import Site
from smoe_dropout.options import ConfigError

TOLERANCE = 2e-5  # relative error; float32 rounding gives about 1e-6, and gelu and its tanh approximation differ by about 3e-4


class Network(NamedTuple):
    """Structure of a feed-forward module: names of its linear maps (`gate` None if it is not gated) and its activation."""

    gate: str | None
    up: str
    down: str
    activation: str


def find_named(model: nn.Module, patterns: str | tuple[str, ...]) -> list[Site]:
    """Sites of the modules whose dotted names match a pattern (fnmatch; `*` also matches dots), in the model's order.

    Such a module has two linear maps D -> F -> D, or three if gated, an activation (as a module or in its forward), and no other
    parameters. An nn.Dropout called between the maps is kept as that of hidden units, and one after the last map as that of the output. A
    functional dropout in a forward cannot be detected and is lost.

    Raises ConfigError for a pattern without match, nested matches, or a module that is not a feed-forward network.
    """
    patterns, found = (patterns,) if isinstance(patterns, str) else patterns, {}
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not (matched := fnmatch.filter(names, pattern)):
            raise ConfigError(f"sites = {pattern!r} matches no module of {type(model).__name__}; {described(model)}")
        found |= dict.fromkeys(matched)
    chosen = [name for name in names if name in found]
    for outer, inner in itertools.permutations(chosen, 2):
        if inner.startswith(f"{outer}."):
            raise ConfigError(f"sites matches both {outer!r} and {inner!r} inside it: name one of them")
    return [_site(model, name) for name in chosen]


def described(model: nn.Module) -> str:
    """Sentence listing patterns that match the model's feed-forward networks, or stating that there are none."""
    found: dict[str, str] = {}
    if isinstance(recognise(model), Network):
        return f"{type(model).__name__} is itself a feed-forward network: pass moefy the model that contains it"
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if (
            name
            and places[module] == 1
            and not any(name.startswith(f"{outer}.") for outer in found)
            and isinstance(network := recognise(module), Network)
        ):
            up = _weight(module.get_submodule(network.up))
            found[name] = f"{up.shape[1]} -> {up.shape[0]} -> {up.shape[1]}"
    if not found:
        return "none of its modules computes exactly down(activation(up x))"
    groups: dict[tuple[str, str], list[str]] = {}
    for name, sizes in found.items():
        groups.setdefault((re.sub(r"\b\d+\b", "*", name), sizes), []).append(name)
    listed = [
        f"{pattern!r} ({len(names)} modules, {sizes})" if len(names) > 1 else f"{names[0]!r} (1 module, {sizes})"
        for (pattern, sizes), names in groups.items()
    ]
    return f"patterns of feed-forward networks for sites=: {', '.join(listed)}"


def recognise(module: nn.Module) -> Network | str:
    """The module's structure, or a sentence why it is not a feed-forward network."""
    maps = {name: _weight(child) for name, child in module.named_modules() if name and _weight(child) is not None}
    if len(maps) not in (2, 3):
        return f"it has {len(maps)} linear map{'s' * (len(maps) != 1)}"
    parts = [part for _, part in module.named_modules(remove_duplicate=False)]
    if len(set(parts)) < len(parts):  # functional_call would leave random weights in the module
        return "it uses one module in several places"
    for name in maps:
        if kinds := dict(module.get_submodule(name).named_parameters()).keys() - {"weight", "bias"}:
            return f"its linear map {name!r} is computed from {', '.join(sorted(kinds))}: remove the parametrization first"
    own = {id(parameter) for name in maps for parameter in module.get_submodule(name).parameters()}
    if other := [name for name, parameter in module.named_parameters() if id(parameter) not in own]:
        return f"it has the parameter {other[0]!r} besides its linear maps"
    orders = [names for names in itertools.permutations(maps) if _fits([maps[name] for name in names])]
    if not orders:
        return f"its linear maps {', '.join(f'{w.shape[1]} -> {w.shape[0]}' for w in maps.values())} do not compose to D -> F -> D"
    found = [match for names in orders if (match := _best_match(module, names))]
    if not found:
        faults = [fault for names in orders if isinstance(fault := _tried(module, names), str)]
        more = f" ({faults[0]})" if len(faults) == len(orders) else ""
        return f"it does not compute down(activation(up x)): it has a residual, a norm, a scale or an unsupported activation{more}"
    return min(found, key=lambda match: match[0])[1]


def _fits(weights: list[Tensor]) -> bool:
    """Whether maps [out, in] in the order ([gate], up, down) compose to D -> F -> D."""
    *first, down = weights
    return all(weight.shape == (down.shape[1], down.shape[0]) for weight in first)


def _best_match(module: nn.Module, names: tuple[str, ...]) -> tuple[float, Network] | None:
    """Relative error and structure for the best-matching activation, given the maps; None if the error exceeds the tolerance."""
    tried = _tried(module, names)
    if isinstance(tried, str):
        return None
    x_1ND, y, linears, _ = tried
    *first, down = linears
    with torch.no_grad():
        pre = torch.cat([F.linear(x_1ND, *linear) for linear in first], -1)
        errors = []
        for name, activation in ACTIVATIONS.items():
            if activation.width == len(first):
                expected = F.linear(activation.apply(pre), *down)
                errors.append((((y.float() - expected).norm() / expected.norm()).item(), name))
    error, activation = min(errors)
    return (error, Network(names[0] if len(names) == 3 else None, *names[-2:], activation)) if error < TOLERANCE else None


class Trial(NamedTuple):
    """One pass of a module with random weights: input, output, (weight, bias) of its maps, and its parts in call order."""

    x_1ND: Tensor
    y: Tensor
    linears: list[tuple[Tensor, Tensor | None]]
    called: list[nn.Module]


def _tried(module: nn.Module, names: tuple[str, ...]) -> Trial | str:
    """Run the module with random weights. Returns an error sentence if it does not map [1, N, D] to [1, N, D]."""
    draw = torch.Generator().manual_seed(0)
    parameters, called = {}, []
    for name, parameter in module.named_parameters():
        fan_in = max(_weight(module.get_submodule(name.rpartition(".")[0])).shape[1], 1)
        parameters[name] = torch.randn(parameter.shape, generator=draw) * (1.0 if parameter.dim() < 2 else 1.5 / fan_in**0.5)
    buffers = {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if not buffer.is_meta}
    linears = [(_transposed(module.get_submodule(name), parameters[f"{name}.weight"]), parameters.get(f"{name}.bias")) for name in names]
    x_1ND = torch.randn(1, 4, linears[0][0].shape[1], generator=draw)
    hooks = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in module.modules()]
    try:
        with _evaluated(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            y = torch.func.functional_call(module, parameters | buffers, (x_1ND,))
    except Exception as error:  # a module that needs other inputs is not a feed-forward network
        return f"it fails on an input of shape {tuple(x_1ND.shape)}: {' '.join(str(error).split())[:200]}"
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(y, Tensor) or y.shape != x_1ND.shape:
        result = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        return f"for an input of shape {tuple(x_1ND.shape)} it returns {result}"
    return Trial(x_1ND, y, linears, called)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Put the module in evaluation mode, and restore the mode of every part on exit."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _site(model: nn.Module, name: str) -> Site:
    module, network = model.get_submodule(name), recognise(model.get_submodule(name))
    if isinstance(network, str):
        raise ConfigError(
            f"sites matches {name!r}, a {type(module).__name__}, which is not a feed-forward network: {network}; a module matched by sites "
            f"must consist of two linear maps with an activation between them, or three if gated, and otherwise only dropout; "
            f"{described(model)}"
        )
    inner, final = _dropouts(name, module, network)
    outer, _, child = name.rpartition(".")
    down = module.get_submodule(network.down)

    def put_dropout(dropout: nn.Module) -> nn.Module:
        holder, _, place = network.down.rpartition(".")
        setattr(module.get_submodule(holder), place, nn.Sequential(dropout, down).train(module.training))
        return down

    maps = [(_weight(part), part.bias) for part in (module.get_submodule(network.up), down)]
    gate = module.get_submodule(network.gate) if network.gate else None
    gates = (None, None) if gate is None else (_weight(gate), gate.bias)
    parent = model.get_submodule(outer)
    return Site(parent, child, *maps[0], *maps[1], network.activation, inner, final, put_dropout, *gates)


def _dropouts(name: str, module: nn.Module, network: Network) -> tuple[float, nn.Module | None]:
    """Probability of the hidden units' dropout, and the dropout after the last map."""
    names = tuple(part for part in network[:3] if part)
    called = [part for part in _tried(module, names).called if isinstance(part, nn.Dropout | nn.Linear) or _weight(part) is not None]
    maps = [called.index(module.get_submodule(part)) for part in names]
    dropouts = [(place, part) for place, part in enumerate(called) if isinstance(part, nn.Dropout)]
    before = [part for place, part in dropouts if place < max(maps[:-1])]
    inner = [part for place, part in dropouts if max(maps[:-1]) < place < maps[-1]]
    behind = [part for place, part in dropouts if place > maps[-1]]
    if before or len(inner) > 1 or len(behind) > 1:
        raise ConfigError(
            f"sites matches {name!r}, whose dropouts cannot be kept: {len(before)} before its hidden units, {len(inner)} of them, "
            f"{len(behind)} of its output; at most one of hidden units and one of the output are supported"
        )
    return inner[0].p if inner else 0.0, behind[0] if behind else None


def _weight(module: nn.Module) -> Tensor | None:
    """Weight [out, in] of a linear map; None for other modules. transformers' Conv1D stores it as [in, out]."""
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return None
    return _transposed(module, module.weight)


def _transposed(module: nn.Module, weight: Tensor) -> Tensor:
    return weight if isinstance(module, nn.Linear) else weight.t()
