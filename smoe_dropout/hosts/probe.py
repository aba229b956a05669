"""Runs of a module on random numbers with its linear maps replaced, to find out what it computes between them.

The module itself is never run or changed: a shallow copy is, on the CPU, in which each linear map is a sparse random one of the same sizes.
So nothing of a model's size is allocated, and weights may be on the meta device, sharded or empty.
"""

import functools
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smoe_dropout.experts.activations import ACTIVATIONS, Activation

TOLERANCE = 1e-5  # of a value; float32 rounding gives 1e-6, and gelu and its tanh approximation differ by 2e-4
RANGE, FAR = 13.0, 1e4  # pre-activations cover this much on both sides of 0, and a few are far, so that clipping shows
FEW = 64  # hidden units that are compared first
_DROPOUTS = (F.dropout, torch.dropout)
_BEFORE = "_before_run"  # attribute of a copy: its attributes


class Event(NamedTuple):
    """An event of a run.

    kind: "map", "dropout", "foreign" (a module with parameters), "module" (one without), or "function" (called through an attribute).
    part: the original module, (module, attribute) of a function, or None for a functional dropout. x, y: input and output. p: probability.
    """

    kind: str
    part: Any
    x: Tensor | None = None
    y: Tensor | None = None
    p: float = 0.0


class SparseMap(nn.Module):
    """A linear map of given sizes with one nonzero weight per row, which records its calls. It claims the weight's shape in float32."""

    def __init__(self, events: list[Event], part: nn.Module, sizes: tuple[int, int], channels_first: bool, seed: int):
        super().__init__()
        draw, (size_in, size_out) = torch.Generator().manual_seed(seed), sizes
        self.events, self.channels_first = events, channels_first
        object.__setattr__(self, "part", part)
        self.rows = torch.randint(size_in, (size_out,), generator=draw)
        self.scales = torch.rand(size_out, generator=draw, dtype=torch.float32) + 0.5
        self.shifts = torch.linspace(-RANGE, RANGE, size_out, dtype=torch.float32)
        self.shifts[0], self.shifts[-1] = -FAR, FAR
        self.shifts = self.shifts[torch.randperm(size_out, generator=draw)].requires_grad_()  # in place of the dense weights
        self.weight = torch.zeros(1, dtype=torch.float32).expand(getattr(getattr(part, "weight", None), "shape", (size_out, size_in)))
        self.bias = None if getattr(part, "bias", None) is None else torch.zeros(1, dtype=torch.float32).expand(size_out)
        self.in_features, self.out_features, self.width = size_in, size_out, size_in

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        y = self.apply_to(x)
        self.events.append(Event("map", self.part, x.clone(), y.clone()))
        return y

    def apply_to(self, x: Tensor) -> Tensor:
        """Apply the map without recording it."""
        last = x.movedim(1, -1) if self.channels_first else x
        if last.shape[-1] != self.width:
            raise ValueError(f"a map of {self.width} values is given {last.shape[-1]}")
        y = last[..., self.rows] * self.scales + self.shifts
        return y.movedim(-1, 1) if self.channels_first else y


class _Foreign(nn.Module):
    """Stands for a module with parameters of its own; returns its first tensor, changed, or values of the size of a linear map's output."""

    def __init__(self, events: list[Event], part: nn.Module):
        super().__init__()
        self.events = events
        object.__setattr__(self, "part", part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Record the call."""
        x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        self.events.append(Event("foreign", self.part, x))
        size = getattr(self.part, "out_features", None)
        if x is None or not isinstance(size, int):
            return x if x is None or not x.is_floating_point() else 1.5 * x - 0.25
        return torch.linspace(-2, 2, size).expand(*x.shape[:-1], size)


class _Dropout(nn.Module):
    """Stands for an nn.Dropout and drops nothing."""

    def __init__(self, events: list[Event], part: nn.Dropout):
        super().__init__()
        self.events, self.p, self.inplace = events, part.p, False
        object.__setattr__(self, "part", part)

    def forward(self, x: Tensor) -> Tensor:
        """Record the call."""
        self.events.append(Event("dropout", self.part, x.clone(), p=self.p))
        return x


class _WithoutDropout(TorchFunctionMode):
    """Records functional dropout and drops nothing."""

    def __init__(self, events: list[Event]):
        super().__init__()
        self.events = events

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _DROPOUTS:
            return function(*args, **kwargs)
        names = ("input", "p", "train" if function is torch.dropout else "training", "inplace")
        given = {"p": 0.5, "training": True, **dict(zip(names, args, strict=False)), **kwargs}
        x = given["input"]
        if given.get("train", given["training"]):
            self.events.append(Event("dropout", None, x.clone(), p=float(given["p"])))
        return x


def copied(module: nn.Module, stubs: dict[nn.Module, nn.Module], events: list[Event], training: bool) -> nn.Module:
    """Shallow copy of a module whose maps are `stubs` and whose other parts record their calls in `events`."""
    if module in stubs:
        return stubs[module]
    if isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward:
        return _Dropout(events, module)
    if not any(part in stubs for part in module.modules()) and (next(module.parameters(), None) is not None):
        return _Foreign(events, module)
    made = object.__new__(type(module))
    hooks = {name: type(value)() for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}
    made.__dict__ = {name: _own(value) for name, value in vars(module).items() if name not in ("forward", "_old_forward")} | hooks
    made.training = training
    draw = torch.Generator().manual_seed(len(events))
    made._parameters = {name: None if p is None else _random(p.shape, draw) for name, p in module._parameters.items()}
    made._buffers = {name: None if b is None else _on_cpu(b) for name, b in module._buffers.items()}
    made._modules = {name: None if c is None else copied(c, stubs, events, training) for name, c in module._modules.items()}
    for name, value in vars(module).items():
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | functools.partial) and not hasattr(nn.Module, name):
            made.__dict__[name] = _recorded(value, (module, name), events)
        elif isinstance(value, types.MethodType) and value.__self__ is module and name in made.__dict__:
            made.__dict__[name] = types.MethodType(value.__func__, made)
    if not any(part in stubs for part in module.modules()):
        made.register_forward_pre_hook(lambda _, __, original=module: events.append(Event("module", original)))
    made.__dict__[_BEFORE] = {name: (value, _state(value)) for name, value in (vars(made) | made._buffers).items()}
    return made


def stored(made: nn.Module) -> str | None:
    """Name of an attribute that a run of a copy has added or changed, in it or in what is inside it, or None."""
    for part in made.modules():
        if (before := vars(part).get(_BEFORE)) is not None:
            for name, value in (vars(part) | part._buffers).items():
                old, state = before.get(name, (_BEFORE, None))
                own = name not in (_BEFORE, "_buffers", "_parameters", "_modules") and "_hooks" not in name
                if own and (value is not old or _state(value) != state):
                    return name
    return None


def _own(value: Any) -> Any:
    """The value, or a copy if a run could change it in place."""
    if type(value) in (list, dict, set):
        return value.copy()
    return _on_cpu(value) if isinstance(value, Tensor) else value


def _state(value: Any) -> Any:
    """Something that changes if the value does."""
    if isinstance(value, Tensor):
        return value._version
    return [*map(id, value), *(map(id, value.values()) if type(value) is dict else ())] if type(value) in (list, dict, set) else None


def _recorded(function: Callable, place: tuple[nn.Module, str], events: list[Event]) -> Callable:
    def call(*inputs, **named):
        events.append(Event("function", place))
        return function(*inputs, **named)

    return call


def _random(shape: torch.Size, draw: torch.Generator) -> Tensor:
    small = torch.randn(shape[-1:] if len(shape) > 1 else shape, generator=draw, dtype=torch.float32)
    return nn.Parameter(small.expand(shape), requires_grad=False)


def _on_cpu(buffer: Tensor) -> Tensor:
    return torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.detach().cpu().clone()


def run(call: Callable[[], Any], events: list[Event], gradients: bool = False) -> Any:
    """Result of a call on the CPU without dropout, autocast, and without consuming the global generator; by default without gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(_WithoutDropout(events))
        return call()


def random_input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard normal float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


@torch.enable_grad()
def gradients(call: Callable[[], Any], inputs: dict[int, Tensor], stubs: list[SparseMap]) -> list[Tensor] | None:
    """Gradients of a weighted sum of what a call returns, with respect to the inputs, which it may add, and to the stubs' shifts.

    None if it returns nothing that has gradients.
    """
    y = [tensor for tensor in _tensors(run(call, [], gradients=True)) if tensor.requires_grad]
    if not y:
        return None
    total = sum((tensor * torch.linspace(1, 2, tensor.numel()).view(tensor.shape)).sum() for tensor in y)
    given = [*inputs.values(), *(stub.shifts for stub in stubs)]
    return list(torch.autograd.grad(total, given, materialize_grads=True))  # of a scalar: otherwise torch would import sympy


def same_gradients(expected: list[Tensor] | None, got: list[Tensor] | None) -> bool:
    """Return whether gradients agree up to rounding."""
    if expected is None or got is None:
        return expected is got
    scales = [max(1.0, tensor.nan_to_num(0, 0, 0).abs().max().item()) if tensor.numel() else 1.0 for tensor in expected]
    return all(torch.allclose(a, b, 1e-2, 1e-5 * scale, True) for a, b, scale in zip(expected, got, scales, strict=True))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def hooked(part: nn.Module) -> bool:
    """Return whether hooks see or change what the module, or one inside it, computes."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind) for module in part.modules() for kind in kinds)


HOOKED = "has hooks, which would be lost: remove them first"
DETACHED = "its gradients are not those of a feed-forward network, as with detach() or a straight-through estimate"


def input_shapes(width: int, channels_first: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes to try, one for training and another one for evaluation: a network does not depend on the number of positions."""
    if channels_first:
        return [((2, width, 3), (1, width, 17)), ((2, width, 2, 3), (1, width, 5, 4))]
    return [((2, 3, width), (1, 17, width)), ((6, width), (17, width)), ((2, 2, 3, width), (1, 5, 4, width))]


ORDERS = {  # how one map packs gate and values: rows of the gate, and of the values
    "gate_first": (lambda rows: rows[: len(rows) // 2], lambda rows: rows[len(rows) // 2 :]),
    "gate_last": (lambda rows: rows[len(rows) // 2 :], lambda rows: rows[: len(rows) // 2]),
    "gate_even": (lambda rows: rows[::2], lambda rows: rows[1::2]),
    "gate_odd": (lambda rows: rows[1::2], lambda rows: rows[::2]),
}


class Found(NamedTuple):
    """An activation's name, how one map packs gate and values, if it does, and which of two maps is the gate."""

    activation: str
    order: str | None = None
    gate: int | None = None


def identify(pres: list[Tensor], hidden: Tensor) -> Found | None:
    """The activation by which the last dimension of `hidden` follows from the outputs of one map, or of two if gated."""
    tried: list[tuple[float, int, Found]] = []

    def compare(gate: Tensor | None, value: Tensor, order: str | None, index: int | None) -> None:
        if value.shape != hidden.shape:
            return
        for name, activation in ACTIVATIONS.items():
            if activation.width != (1 if gate is None else 2):
                continue
            if error(activation, gate, value, FEW) < TOLERANCE and (whole := error(activation, gate, value, None)) < TOLERANCE:
                tried.append((whole, len(tried), Found(name, order, index)))

    def error(activation: Activation, gate: Tensor | None, value: Tensor, units: int | None) -> float:
        pre = value[..., :units] if gate is None else torch.cat([gate[..., :units], value[..., :units]], -1)
        expected = activation.apply(pre)
        scale = 1 + expected.abs() + (0 if gate is None else value[..., :units].abs())
        return ((hidden[..., :units] - expected).abs() / scale).max().item() if hidden.numel() else 1.0  # NaN is not below anything

    if len(pres) == 1 and pres[0].shape == hidden.shape:
        compare(None, pres[0], None, None)
    elif len(pres) == 1 and pres[0].shape[-1] == 2 * hidden.shape[-1]:
        rows = pres[0].movedim(-1, 0)
        for order, (gate, value) in ORDERS.items():
            compare(gate(rows).movedim(0, -1), value(rows).movedim(0, -1), order, None)
    elif len(pres) == 2:
        for index in (0, 1):
            compare(pres[index], pres[1 - index], None, index)
    return min(tried)[2] if tried else None


def activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """Name of the activation that a module without parameters, or a function, computes; None if experts do not support it."""
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        return None
    pre = torch.linspace(-RANGE, RANGE, 512, dtype=torch.float32, device="cpu")
    pre[0], pre[-1] = -FAR, FAR
    try:
        hidden = run(lambda: function(pre.clone()), [])
    except Exception:  # a function of something else than a tensor is not an activation
        return None
    found = identify([pre], hidden) if isinstance(hidden, Tensor) else None
    return None if found is None or found.activation == "linear" else found.activation
