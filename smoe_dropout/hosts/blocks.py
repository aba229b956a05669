"""Feed-forward networks that lie in a block: their maps are children of it, and the block's own forward applies what is between.

The experts take the place of the first map, and what lies between is switched off: the activation becomes an identity, dropout 0, the
second map an identity. That this is equal is verified on the changed block before the model is touched.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smoe_dropout.hosts.maps import linear_map, obstacle
from smoe_dropout.hosts.network import MIXING, UNKNOWN, Network, described, foreign, hidden_values, is_hidden, rows
from smoe_dropout.hosts.probe import (
    DETACHED,
    FAR,
    HOOKED,
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
from smoe_dropout.hosts.source import Piece, pieces, uses_elsewhere

NOT_IN_ORDER = "its maps are not called one after the other"


class Change(NamedTuple):
    """New value of a module's attribute."""

    holder: nn.Module
    name: str
    value: Any


class Lying(NamedTuple):
    """A feed-forward network in a block: `place` is the block's child that the experts replace, and `changes` switch off the rest."""

    network: Network
    place: str
    changes: list[Change]


def unchanged(x: Tensor) -> Tensor:
    """Takes the place of an activation that is a function."""
    return x


class _Whole(nn.Module):
    """Stands for the experts: computes the whole network with the stubs of its maps."""

    def __init__(self, up: SparseMap, down: SparseMap, network: Network):
        super().__init__()
        object.__setattr__(self, "up", up)
        object.__setattr__(self, "down", down)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        found = Found(self.network.activation, self.network.order)
        return self.down.apply_to(hidden_values([self.up.apply_to(x)], found, self.up.channels_first))


class _Down(nn.Module):
    """Stands for the second map: returns what the experts would, and records what arrives."""

    def __init__(self, events: list[Event], part: nn.Module, experts: SparseMap | None):
        super().__init__()
        self.events, self.experts = events, experts
        object.__setattr__(self, "part", part)

    def forward(self, x: Tensor) -> Tensor:
        """Record the call."""
        entered = [event.x for event in self.events if event.kind == "map"]
        if not entered:
            raise ValueError(NOT_IN_ORDER)
        y = x if self.experts is None else self.experts.apply_to(entered[-1])
        self.events.append(Event("down", self.part, x.clone(), y.clone()))
        return y


def lying(block: nn.Module, up_name: str, down_name: str) -> Lying | str:
    """The network from child map `up_name` to `down_name` (dotted names in the block), or a sentence why there is none."""
    up, down = block.get_submodule(up_name), block.get_submodule(down_name)
    for name, part in ((up_name, up), (down_name, down)):
        if (reason := obstacle(part)) is not None:
            return f"its linear map {name!r} {reason}"
    first, last = up_name.split(".")[0], down_name.split(".")[0]
    if first == last:
        return f"its maps {up_name!r} and {down_name!r} lie in one child"
    inside = block.get_submodule(first)
    for name, _ in inside.named_parameters():
        if inside.get_submodule(name.rpartition(".")[0]) is not up:
            return f"{foreign(inside, name)} lies in {first!r}, too, which the experts would replace"
    maps = {part: linear_map(part) for part in (up, down)}
    if maps[up].channels_first != maps[down].channels_first:
        return "it mixes linear maps and convolutions"
    reasons: list[str] = []
    for more in (0, 1):  # the statement after the second map may use the same dropout
        found = pieces(block, first, last, more)
        if isinstance(found, str):
            return found
        for shape in input_shapes(maps[up].sizes[0], maps[up].channels_first):
            result = _tried(block, up, down, (first, last), found, shape)
            if isinstance(result, Lying):
                return result
            reasons.append(result)
            if not result.startswith("it fails"):
                break
        used = {name for piece in found for name in piece.uses} - {first, last}
        for name in (name for name, child in block.named_children() if name in used and next(child.parameters(), None) is not None):
            reasons.append(f"{described(block.get_submodule(name), name)} lies between its maps")
    return next((reason for reason in reasons if not reason.startswith("it fails")), reasons[0])


def _tried(block: nn.Module, up: nn.Module, down: nn.Module, ends: tuple[str, str], found: list[Piece], shape) -> Lying | str:
    results: list[Lying] = []
    for piece in found:
        for training in (True, False):
            result = _of_piece(block, up, down, ends, found, piece, shape, training)
            if isinstance(result, str):
                return result
            if results and result.network[:5] != results[0].network[:5]:
                return "it computes different things in different places of its forward, or in training and in evaluation"
            results.append(result)
    changes = results[0].changes
    for piece in found:
        for training in (True, False):
            for verify, variant in itertools.product((_verified, _differentiated), (piece, *piece.flipped())):
                if (reason := verify(block, up, down, results[0], variant, shape, training)) is not None:
                    return reason
    removed = [block.get_submodule(ends[0]), *(getattr(change.holder, change.name) for change in changes)]
    if hooks := [part for part in removed if isinstance(part, nn.Module) and hooked(part)]:
        return f"its {next(name for name, part in block.named_modules() if part is hooks[0])!r} {HOOKED}"
    names = {*ends, *(change.name for change in changes if change.holder is block)}
    if used := sorted(name for name in names if uses_elsewhere(block, name, found)):
        return f"it uses {used[0]!r} elsewhere in its forward, too"
    return results[0]


def _of_piece(block, up, down, ends, found, piece: Piece, shape, training: bool) -> Lying | str:
    """Read activation, dropouts, and what must be switched off from one run of the statements."""
    events: list[Event] = []
    first = linear_map(up).channels_first
    width = linear_map(up).sizes[0]
    stub = SparseMap(events, up, linear_map(up).sizes, first, 1)
    stubs = {up: stub, down: _Down(events, down, SparseMap(events, down, (width, width), first, 2))}
    if isinstance(outcome := _outcome(block, stubs, events, piece, shape, training), Exception):
        return _failed(outcome, shape)
    places = {event.kind: place for place, event in enumerate(events)}
    if [event.kind for event in events if event.kind in ("map", "down")] != ["map", "down"]:
        return "it does not call each of its maps once, one after the other"
    between = events[places["map"] + 1 : places["down"]]
    if others := [event for event in between if event.kind == "foreign"]:
        name = next(name for name, part in block.named_modules() if part is others[0].part)
        return f"{described(others[0].part, name)} lies between its maps"
    u, h = events[places["map"]].y, events[places["down"]].x
    pres, hidden = rows([u], first), rows([h], first)
    if len(pres) != len(hidden) or (act := identify([pres], hidden)) is None:
        return UNKNOWN if len(pres) == len(hidden) and not _mixes(block, up, down, piece, shape) else MIXING
    if act.activation == "linear" and not any(event.kind in ("module", "function") for event in between):
        return "there is no activation between its maps"
    drops = [event for event in between if event.kind == "dropout" and (event.part is not None or event.p > 0)]
    if len(drops) > 1 or (drops and not is_hidden(rows([drops[0].x], first), hidden, [], act, first)):
        return "its dropout between the maps is not that of hidden units"
    p, inner = (drops[0].p, drops[0].part) if drops else (0.0, None)
    changes = _changes(block, down, ends, between, events[places["down"] + 1 :], events[places["down"]].y, found)
    if isinstance(changes, str):
        return changes
    return Lying(Network(up, down, None, act.activation, act.order, p, inner), ends[0], changes)


def _mixes(block, up, down, piece: Piece, shape) -> bool:
    """Return whether changing one unit before the activation changes others after it."""
    hidden = []
    for shift in (0.0, 3 * FAR):
        events: list[Event] = []
        first, sizes = linear_map(up).channels_first, linear_map(up).sizes
        stub = SparseMap(events, up, sizes, first, 1)
        stub.shifts.data[0] += shift
        parts = {up: stub, down: _Down(events, down, SparseMap([], down, (sizes[0], sizes[0]), first, 2))}
        _outcome(block, parts, events, piece, shape, False)
        hidden += [rows([event.x], first) for event in events if event.kind == "down"]
    return len(hidden) == 2 and bool((hidden[0] != hidden[1])[:, 1:].any())


def _changes(block: nn.Module, down: nn.Module, ends: tuple[str, str], between: list[Event], after: list[Event], arrived, found):
    """List what to switch off, given what is called between the maps and after them, where `arrived` is the second map's output."""
    inside = set(block.get_submodule(ends[0]).modules())  # goes with the first map
    holders = {child: (holder, name) for holder in block.modules() for name, child in holder.named_children()}
    changes, behind = [], nn.Identity()
    called = [event.part for event in between if event.kind == "module" and event.part not in inside]
    outer = [part for part in called if not any(part is not other and part in set(other.modules()) for other in called)]
    for part in dict.fromkeys(outer):
        changes.append(Change(*holders[part], nn.Identity()))
    for event in between:
        if event.kind == "function" and event.part[0] not in inside and not any(event.part[0] in set(p.modules()) for p in outer):
            changes.append(Change(*event.part, unchanged))
        if event.kind != "dropout" or event.part in inside:
            continue
        if event.part is not None:
            changes.append(Change(*holders[event.part], nn.Identity()))
            if again := [other for other in after if other.kind == "dropout" and other.part is event.part]:
                if len(again) > 1 or not torch.equal(again[0].x, arrived):
                    return "its dropout of hidden units is used elsewhere, too"
                behind = event.part  # also that of the output, right behind the second map: it takes that map's place
        elif event.p > 0:
            names = [n for n, value in vars(block).items() if type(value) is float and value == event.p and _reads(found, n)]
            if len(names) != 1:
                return f"its functional dropout of {event.p} between the maps has no attribute of its own: set it to 0 first"
            changes.append(Change(block, names[0], 0.0))
    changes.append(Change(*holders[down], behind))
    return changes


def _reads(found: list[Piece], name: str) -> bool:
    return any(name in piece.uses for piece in found)


def _verified(block, up, down, result: Lying, piece: Piece, shape, training: bool) -> str | None:
    """Compare the statements' results before and after the change; None if they are equal."""
    first, width = linear_map(up).channels_first, linear_map(up).sizes[0]
    before: list[Event] = []
    experts = SparseMap([], down, (width, width), first, 2)
    stubs = {up: SparseMap(before, up, linear_map(up).sizes, first, 1), down: _Down(before, down, experts)}
    expected = _outcome(block, stubs, before, piece, shape, training)
    if isinstance(expected, Exception):  # an option that does not apply
        return None
    after: list[Event] = []
    place = block.get_submodule(result.place)
    stand_in = SparseMap(after, place, (width, width), first, 2)
    del stand_in.weight, stand_in.bias, stand_in.in_features  # experts have none
    parts: dict[nn.Module, nn.Module] = {place: stand_in}
    for change in result.changes:
        old = getattr(change.holder, change.name)
        if isinstance(old, nn.Module):
            parts[old] = _Down(after, old, None) if old is down else nn.Identity()
    values = {change.name: change.value for change in result.changes if change.holder is block and not isinstance(change.value, nn.Module)}
    got = _outcome(block, parts, after, piece, shape, training, values)
    if isinstance(got, Exception):
        return _failed(got, shape)
    maps, arrived = [e for e in after if e.kind == "map"], [e for e in after if e.kind == "down"]
    if len(maps) != 1 or len(arrived) != 1 or not torch.equal(maps[0].y, arrived[0].x):
        return "what it does between its maps cannot be switched off: make the activation a module or an attribute of the block"
    entered = next(event.x for event in before if event.kind == "map")
    begin, end = (next(place for place, event in enumerate(after) if event.kind == kind) for kind in ("map", "down"))
    if not torch.equal(maps[0].x, entered) or any(event.kind == "dropout" and event.p > 0 for event in after[begin:end]):
        return "what it does between its maps cannot be switched off"
    behind = [change.value.p for change in result.changes if isinstance(change.value, nn.Dropout)]
    if _dropped(before, []) != _dropped(after, behind):
        return "the dropout of its hidden units serves something else, too"
    return None if _equal(expected, got) else "it uses hidden values elsewhere, too"


def _differentiated(block, up, down, result: Lying, piece: Piece, shape, training: bool) -> str | None:
    """Compare the gradients before and after the change, and results once more; None if they are equal."""
    first, network = linear_map(up).channels_first, result.network
    stubs = {part: SparseMap([], part, linear_map(part).sizes, first, seed) for seed, part in enumerate((up, down), 1)}
    place = block.get_submodule(result.place)
    parts: dict[nn.Module, nn.Module] = {place: _Whole(*stubs.values(), network)}
    for change in result.changes:
        if isinstance(old := getattr(change.holder, change.name), nn.Module):
            parts[old] = nn.Identity()
    values = {change.name: change.value for change in result.changes if change.holder is block and not isinstance(change.value, nn.Module)}
    inputs: list[dict[int, Tensor]] = [{}, {}]
    outcomes = []
    for given, own, more in zip(inputs, (stubs, parts), ({}, values), strict=True):
        made = copied(block, own, [], training)
        made.__dict__ |= more

        def make(seed: int, given=given) -> Tensor:
            given[seed] = random_input(shape[0], seed)[:1].requires_grad_()  # few positions are enough
            return given[seed].clone()

        try:
            outcomes.append(gradients(lambda: piece(made, make), given, [*stubs.values()]))  # noqa: B023 - called at once
        except Exception as error:
            return None if own is stubs else _failed(error, shape)
        if own is stubs and (name := stored(made)) is not None:
            return f"its forward changes its attribute {name!r}"
    return None if same_gradients(*outcomes) else DETACHED


def _dropped(events: list[Event], behind: list[float]) -> tuple[list[float], list[float]]:
    """Probabilities of the dropouts before the first map and after the second, which is followed by `behind`."""
    begin, end = (next(place for place, event in enumerate(events) if event.kind == kind) for kind in ("map", "down"))
    first, last = ([event.p for event in part if event.kind == "dropout" and event.p > 0] for part in (events[:begin], events[end:]))
    return first, [p for p in behind if p > 0] + last


def _outcome(block, stubs, events, piece: Piece, shape, training: bool, values: dict[str, Any] | None = None) -> Any:
    """Result of the statements, or the error that they raise."""
    try:
        made = copied(block, stubs, events, training)
        made.__dict__ |= values or {}
        return run(lambda: piece(made, lambda seed: random_input(shape[0 if training else 1], seed)), events)
    except Exception as error:
        return error


def _failed(error: Exception, shape: tuple[tuple[int, ...], ...]) -> str:
    if str(error) == NOT_IN_ORDER:
        return NOT_IN_ORDER
    return f"it fails on an input of shape {shape[0]}: {' '.join(str(error).split())[:160]}"


def _equal(expected: Any, got: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(got, Tensor) and expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-5, atol=1e-5)
    if isinstance(expected, dict):
        return isinstance(got, dict) and expected.keys() == got.keys() and all(_equal(expected[name], got[name]) for name in expected)
    if isinstance(expected, list | tuple):
        return type(expected) is type(got) and len(expected) == len(got) and all(map(_equal, expected, got))
    return type(expected) is type(got)
