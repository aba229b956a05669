"""Changes that a conversion makes to a model: undone if it fails, and remembered without the weights, so that it can be taken back.

Whatever a host changes is found by comparing the model's modules before and after, so hosts need not say how to undo it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smoe_dropout.hosts.site import Site

CHANGES = "_before_moefy"  # attribute of a module that a conversion has changed: a list of its changes, the latest last
TABLES = ("_modules", "_parameters", "__dict__")
TENSORS = ("up", "bias_up", "down", "bias_down", "gate", "bias_gate")


class Change(NamedTuple):
    """Entries of one table of a module: their names in order and values before a conversion, and the values that replaced them.

    table: "__dict__" for its attributes, or the name of a dict among them.
    """

    table: str
    order: tuple[str, ...]
    before: dict[str, Any]
    after: dict[str, Any]


class Place(NamedTuple):
    """A dense map inside a parameter `holder.name`, as a view of it. The parameter is on the meta device, since its weights are gone."""

    holder: nn.Module
    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Snapshot:
    """The modules of a model before a conversion. Holds references to them, so it must not outlive the conversion."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.state = {
            module: {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}
            for module in model.modules()
        }

    def restore(self) -> None:
        """Undo everything done to the modules since, hooks and attributes included."""
        for module, before in self.state.items():
            vars(module).clear()
            for name, (value, content) in before.items():
                if content is not None:
                    value.clear()
                    value.update(content)
                vars(module)[name] = value

    def remember(self, sites: Iterable[Site]) -> list[dict[str, Place] | None]:
        """Store in every changed module how to undo the change, and return for each site where its dense maps were.

        Modules that are no longer in the model are stored as copies with these maps on the meta device. None for a site whose maps are not
        views of a parameter, or whose modules have a forward of their own instance, as those of accelerate's hooks.
        """
        owners = {id(p): (module, name) for module, before in self.state.items() for name, p in before["_parameters"][1].items()}
        tensors = [dense_tensors(site) for site in sites]
        weights = {id(base(tensor)) for its in tensors for tensor in its.values()}
        archive = _Archive(set(self.model.modules()), weights)
        for module in self.model.modules():
            if changes := [change for table in TABLES if module in self.state and (change := self._change(module, table))]:
                stored = [change._replace(before={name: archive.of(value) for name, value in change.before.items()}) for change in changes]
                vars(module)[CHANGES] = [*vars(module).get(CHANGES, []), stored]
        return [_places(its, owners, archive) for its in tensors]

    def remember_hooks(self) -> None:
        """Store in every module which hooks it has got since, and any other entries of its dicts."""
        for module in self.model.modules():
            before = {name: set(content) for name, (_, content) in self.state.get(module, {}).items() if content is not None}
            now = {name: vars(module)[name] for name in before.keys() - TABLES if isinstance(vars(module).get(name), dict)}
            new = {name: entries.keys() - before[name] for name, entries in now.items()}
            if changes := [Change(name, (), {}, dict.fromkeys(keys)) for name, keys in new.items() if keys]:
                vars(module)[CHANGES] = [*vars(module).get(CHANGES, []), changes]

    def _change(self, module: nn.Module, table: str) -> Change | None:
        if table == "__dict__":
            names = [name for name in {**self.state[module], **vars(module)} if name != CHANGES]
            before = {name: self.state[module][name][0] for name in names if name in self.state[module]}
            now = vars(module)
        else:
            before, now = self.state[module][table][1], getattr(module, table)
        gone = {name: value for name, value in before.items() if not isinstance(value, dict) and now.get(name, Change) is not value}
        put = {name: value for name, value in now.items() if not isinstance(value, dict) and before.get(name, Change) is not value}
        put.pop(CHANGES, None)
        return Change(table, tuple(before) if table != "__dict__" else (), gone, put) if gone or put else None


class _Archive:
    """Shallow copies of modules that a conversion removed, their `weights` (ids of parameters) on the meta device."""

    def __init__(self, inside: set[nn.Module], weights: set[int]):
        self.inside, self.weights = inside, weights
        self.copies: dict[nn.Module, nn.Module] = {}

    def of(self, value: Any) -> Any:
        """The copy of a removed module; a module that is still in the model and any other value as they are."""
        if not isinstance(value, nn.Module) or value in self.inside:
            return self._parameter(value)
        if value not in self.copies:
            made = self.copies[value] = value.__new__(type(value))
            vars(made).update({name: copy.copy(own) if isinstance(own, dict) else own for name, own in vars(value).items()})
            made._modules = {name: self.of(child) for name, child in value._modules.items()}
            made._parameters = {name: self._parameter(parameter) for name, parameter in value._parameters.items()}
        return self.copies[value]

    def _parameter(self, value: Any) -> Any:
        return nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad) if id(value) in self.weights else value


def _places(tensors: dict[str, Tensor], owners: dict[int, tuple[nn.Module, str]], archive: _Archive) -> dict[str, Place] | None:
    places = {}
    for name, tensor in tensors.items():
        module, parameter = owners.get(id(base(tensor)), (None, ""))
        if module not in archive.copies or "forward" in vars(module):
            return None
        weight, emptied = module._parameters[parameter], archive.copies[module]._parameters[parameter]
        if weight.stride() != emptied.stride():
            return None
        offset = tensor.storage_offset() - weight.storage_offset()
        places[name] = Place(archive.copies[module], parameter, tuple(tensor.shape), tensor.stride(), offset)
    return places


def dense_tensors(site: Site) -> dict[str, Tensor]:
    """The dense maps and biases of a network, by name."""
    return {name: tensor for name in TENSORS if (tensor := getattr(site, name)) is not None}


def base(tensor: Tensor) -> Tensor:
    """The parameter that a tensor is a view of, such as a transposed weight, or the tensor itself."""
    return tensor if tensor._base is None else tensor._base


def _stored(module: nn.Module) -> list[Change]:
    return [change for conversion in vars(module).get(CHANGES, ()) for change in conversion]


def put_modules(module: nn.Module) -> list[nn.Module]:
    """Modules that conversions put into this one."""
    return [value for change in _stored(module) for value in change.after.values() if isinstance(value, nn.Module)]


def with_removed(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of the model, and the copies of those that conversions removed."""
    for module in model.modules():
        yield module
        for change in _stored(module):
            for value in change.before.values():
                if isinstance(value, nn.Module):
                    yield from value.modules()


def replaced_since(module: nn.Module) -> str | None:
    """Name of a child that a conversion put here and that is no longer here, or None."""
    put = {name: value for change in _stored(module) if change.table == "_modules" for name, value in change.after.items()}
    return next((name for name, value in put.items() if module._modules.get(name) is not value), None)


def undo(module: nn.Module) -> None:
    """Put back what conversions replaced in the module, and remove what they added. Entries that are new since are kept."""
    for change in reversed(_stored(module)):
        table = vars(module) if change.table == "__dict__" else getattr(module, change.table)
        now = {name: value for name, value in table.items() if name not in change.after} | change.before
        table.clear()
        table.update({name: now[name] for name in (*change.order, *now) if name in now})
        for value in change.before.values():
            if isinstance(value, nn.Module):
                value.train(module.training)
    vars(module).pop(CHANGES, None)


def fill(places: dict[str, Place], tensors: dict[str, Tensor], trained: dict[str, bool]) -> None:
    """Give the parameters that hold these dense maps new weights, in the precision and on the device of `tensors`.

    trained: by name, whether a parameter is trained.
    """
    made: dict[tuple[nn.Module, str], Tensor] = {}
    for name, (holder, parameter, size, stride, offset) in places.items():
        key, value = (holder, parameter), tensors[name]
        if key not in made:
            made[key] = torch.empty_like(holder._parameters[parameter], device=value.device, dtype=value.dtype)
            holder._parameters[parameter] = nn.Parameter(made[key], trained[name])
        with torch.no_grad():
            made[key].as_strided(size, stride, offset).copy_(value)
