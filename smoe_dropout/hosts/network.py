"""Return whether a module is a feed-forward network, by running it: `recognise(module)` says how it is made, or why it is none."""

from __future__ import annotations

import inspect
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.hosts.maps import Map, linear_map, obstacle, stands_for_map
from smoe_dropout.hosts.probe import (
    DETACHED,
    FAR,
    HOOKED,
    ORDERS,
    Event,
    Found,
    SparseMap,
    copied,
    gradients,
    hooked,
    identify,
    input_shapes,
    random_input,
    run,
    same_gradients,
    stored,
)


class Network(NamedTuple):
    """A feed-forward network: its linear maps, what lies between them, and what follows.

    order: how `up` packs gate and values, if it does. dropout: probability for hidden units; inner: its module. final: module after `down`.
    """

    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    activation: str
    order: str | None = None
    dropout: float = 0.0
    inner: nn.Module | None = None
    final: nn.Module | None = None


def maps_in(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that stand for linear maps, usable or not, by name; not what is inside them."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if name and not any(name.startswith(f"{outer}.") for outer in found) and stands_for_map(child):
            found[name] = child
    return found


def fits(up: tuple[int, int] | None, down: tuple[int, int] | None) -> bool:
    """Return whether maps of these (in, out) sizes compose to D -> F -> D, `up` possibly packing a gate."""
    return up is not None and down is not None and up[0] == down[1] and up[1] in (down[0], 2 * down[0])


def recognise(module: nn.Module) -> Network | str:
    """The network that the module computes exactly, or a sentence why it is none."""
    parts = maps_in(module)
    if len(parts) not in (2, 3):
        return f"it has {len(parts)} linear map{'s' * (len(parts) != 1)}"
    for name, part in parts.items():
        if (reason := obstacle(part)) is not None:
            return f"its linear map {name!r} {reason}"
    maps = {part: linear_map(part) for part in parts.values()}
    sizes = [found.sizes for found in maps.values()]
    if not any(fits(first[0], first[-1]) and (len(first) == 2 or fits(first[1], first[-1])) for first in itertools.permutations(sizes)):
        return f"its linear maps {', '.join(f'{size[0]} -> {size[1]}' for size in sizes)} do not compose to D -> F -> D"
    if len({found.channels_first for found in maps.values()}) > 1:
        return "it mixes linear maps and convolutions"
    own = {id(parameter) for part in maps for parameter in part.parameters()}
    if other := [name for name, parameter in module.named_parameters() if id(parameter) not in own]:
        return f"it has the parameter {other[0]!r} besides its linear maps: {foreign(module, other[0])}"
    needed = [p for p in _parameters(module) if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) != 1:
        return f"its forward takes {len(needed)} inputs"
    return _run(module, maps)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []


def foreign(module: nn.Module, parameter: str) -> str:
    """The module that has the parameter, in words."""
    holder, _, name = parameter.rpartition(".")
    return described(module.get_submodule(holder), holder) if holder else f"a scale or shift {name!r}"


def described(part: nn.Module, name: str) -> str:
    """A module with parameters in words."""
    kind, own = type(part).__name__, [parameter for parameter in part.parameters()]
    if "Conv" in kind or any(parameter.dim() > 2 for parameter in own):
        return f"the convolution {name!r} ({kind})"
    if "norm" in kind.lower():
        return f"the norm {name!r} ({kind})"
    if stands_for_map(part) or any(parameter.dim() == 2 for parameter in own):
        return f"a further map {name!r} ({kind})"
    return f"the parametrised {name!r} ({kind})"


def _run(module: nn.Module, maps: dict[nn.Module, Map]) -> Network | str:
    """Run a module that has nothing but these maps, on inputs of the usual numbers of dimensions."""
    channels_first = next(iter(maps.values())).channels_first
    width = max(found.sizes for found in maps.values() if any(fits(found.sizes, other.sizes) for other in maps.values()))[0]
    widths = {found.sizes[0] for found in maps.values() if any(fits(found.sizes, other.sizes) for other in maps.values())}
    tried = [input_shapes(size, channels_first) for size in sorted(widths, key=lambda size: size != width)]
    shapes = [pair for place in range(len(tried[0])) for pair in (pairs[place] for pairs in tried)]
    reasons = []
    for shape in shapes:
        found = _tried(module, maps, shape)
        if isinstance(found, Network) or not found.startswith("it fails"):
            return found
        reasons.append(found)
    return reasons[0]


def _tried(module: nn.Module, maps: dict[nn.Module, Map], shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Network | str:
    found = None
    for training, shape in zip((True, False), shapes, strict=True):
        x = random_input(shape)
        events: list[Event] = []
        stubs = {p: SparseMap(events, p, m.sizes, m.channels_first, seed) for seed, (p, m) in enumerate(maps.items())}
        try:
            made = copied(module, stubs, events, training)
            y = run(lambda: made(x.clone()), events)  # noqa: B023 - called at once
        except Exception as error:
            return f"it fails on an input of shape {shape}: {' '.join(str(error).split())[:160]}"
        if not isinstance(y, Tensor) or y.shape != x.shape:
            result = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            return f"for an input of shape {shape} it returns {result}"
        result = _read(events, stubs, x, y, training)
        if isinstance(result, str):
            return MIXING if result == UNKNOWN and _mixes(module, maps, x) else result
        if found is not None and result[:4] != found[:4]:
            return "it computes something else in training than in evaluation"
        if (name := stored(made)) is not None:
            return f"its forward changes its attribute {name!r}"
        if not _differentiated(module, result, stubs, random_input(shapes[0])[:1], training):
            return DETACHED
        found = found or result
    return next((f"its {name or type(module).__name__!r} {HOOKED}" for name, part in module.named_modules() if hooked(part)), found)


def _differentiated(module: nn.Module, network: Network, stubs: dict[nn.Module, SparseMap], x: Tensor, training: bool) -> bool:
    """Return whether the module's gradients are those of the network."""
    x.requires_grad_()
    ups = [stubs[part] for part in (network.gate, network.up) if part is not None]
    given = Found(network.activation, network.order, None if network.gate is None else 0)
    first = ups[0].channels_first
    expected = gradients(
        lambda: stubs[network.down].apply_to(hidden_values([up.apply_to(x) for up in ups], given, first)), {0: x}, [*stubs.values()]
    )
    return same_gradients(expected, gradients(lambda: copied(module, stubs, [], training)(x.clone()), {0: x}, [*stubs.values()]))


UNKNOWN = (
    "its activation, or a scale next to it, is none that experts support: an activation without parameters can be added to "
    "smoe_dropout.experts.activations.ACTIVATIONS"
)
MIXING = "between its maps hidden units are mixed or not all treated alike, as by a norm, a mask or a scale"


def _read(events: list[Event], stubs: dict, x: Tensor, y: Tensor, training: bool) -> Network | str:
    """Read the roles of the maps, the activation and the dropouts from the events of a run."""
    calls = [event for event in events if event.kind == "map"]
    order = list(dict.fromkeys(event.part for event in calls))
    if len(order) < len(stubs):
        return f"it uses {len(order)} of its {len(stubs)} linear maps"
    *ups, down = order
    by_part = {part: [event for event in calls if event.part is part] for part in order}
    count = len(by_part[down])
    if any(len(by_part[part]) != count for part in ups):
        return "it uses one of its linear maps several times"
    first = stubs[down].channels_first
    pres = [rows([event.y for event in by_part[part]], first) for part in ups]
    hidden = rows([event.x for event in by_part[down]], first)
    entering, leaving = rows([x], first), rows([y], first)
    came = [rows([event.x for event in by_part[part]], first) for part in ups]
    if any(tensor.shape != entering.shape for tensor in came) or (count == 1 and any(not torch.equal(t, entering) for t in came)):
        return "its input is changed before its first map, as by a norm or a scale"
    if len({len(tensor) for tensor in (*pres, hidden)}) > 1 or (found := identify(pres, hidden)) is None:
        return UNKNOWN
    if count > 1:  # in parts, as by chunking: compare the whole
        expected = stubs[down].apply_to(hidden_values([stubs[part].apply_to(x) for part in ups], found, first))
        same = torch.allclose(y, expected, rtol=1e-4, atol=1e-3)
    else:
        same = torch.equal(leaving, rows([by_part[down][0].y], first))
    if not same:
        return "its output is not that of its last map: it adds a residual, a norm or a scale"
    return _with_dropouts(events, calls, ups, down, found, hidden, leaving, first, training)


def _with_dropouts(events, calls, ups, down, found: Found, hidden, leaving, first: bool, training: bool) -> Network | str:
    places = {id(event): place for place, event in enumerate(events)}
    drops = [event for event in events if event.kind == "dropout" and (event.part is not None or event.p > 0)]
    if not training and any(event.part is None for event in drops):
        return "it drops values in evaluation, too"
    begin, end = places[id(calls[0])], places[id(calls[-1])]
    down_at = next(places[id(event)] for event in calls if event.part is down)
    behind = [event for event in drops if places[id(event)] > end]
    inner = [event for event in drops if begin < places[id(event)] < down_at]
    before = [event for event in drops if places[id(event)] < begin]
    if before or len(inner) > 1 or len(behind) > 1:
        return (
            f"its dropouts cannot be kept: {len(before)} before its hidden units, {len(inner)} of them, {len(behind)} of its output; at "
            "most one of hidden units and one of the output are supported"
        )
    if inner and not is_hidden(rows([inner[0].x], first), hidden, [event for event in calls if event.part in ups], found, first):
        return "its dropout lies before its activation"
    gate = None if found.gate is None else ups[found.gate]
    up = ups[0] if found.gate is None else ups[1 - found.gate]
    final = None
    if behind:
        final = behind[0].part if behind[0].part is not None else nn.Dropout(behind[0].p)
    p, module = (inner[0].p, inner[0].part) if inner else (0.0, None)
    return Network(up, down, gate, found.activation, found.order, p, module, final)


def is_hidden(dropped: Tensor, hidden: Tensor, ups: list[Event], found: Found, first: bool) -> bool:
    """Return whether dropout of these values is dropout of hidden units: they are the hidden values, or one factor of them."""
    count = len(dropped)
    if dropped.shape[1:] != hidden.shape[1:]:
        return False
    if torch.equal(dropped, hidden[:count]):
        return True
    if found.gate is None:
        return False
    opened = ACTIVATIONS[found.activation.removesuffix("_gated")].apply(rows([ups[found.gate].y], first)[:count])
    return torch.allclose(dropped, opened, rtol=1e-4, atol=1e-5)


def hidden_values(pres: list[Tensor], found: Found, first: bool) -> Tensor:
    """Hidden values, given the outputs of the maps before them."""
    pres = [pre.movedim(1, -1) if first else pre for pre in pres]
    if found.gate is not None:
        pres = [pres[found.gate], pres[1 - found.gate]]
    pre = torch.cat(pres, -1)
    if found.order is not None:
        gate, value = ORDERS[found.order]
        units = pre.movedim(-1, 0)
        pre = torch.cat([gate(units), value(units)]).movedim(0, -1)
    hidden = ACTIVATIONS[found.activation].apply(pre)
    return hidden.movedim(-1, 1) if first else hidden


def rows(tensors: list[Tensor], channels_first: bool) -> Tensor:
    """Tensors of several calls as rows of features."""
    last = [tensor.movedim(1, -1) if channels_first and tensor.dim() > 1 else tensor for tensor in tensors]
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in last])


def _mixes(module: nn.Module, maps: dict[nn.Module, Map], x: Tensor) -> bool:
    """Return whether changing one unit before the activation changes others after it."""
    hidden = []
    for shift in (0.0, 3 * FAR):
        events: list[Event] = []
        stubs = {p: SparseMap(events, p, m.sizes, m.channels_first, seed) for seed, (p, m) in enumerate(maps.items())}
        for stub in stubs.values():
            stub.shifts.data[0] += shift
        run(lambda: copied(module, stubs, events, False)(x.clone()), events)  # noqa: B023 - called at once
        calls = [event for event in events if event.kind == "map"]
        hidden.append(rows([calls[-1].x], stubs[calls[-1].part].channels_first))
    same = (hidden[0] == hidden[1]) | (hidden[0].isnan() & hidden[1].isnan())
    return bool((~same[:, 1:]).any())
