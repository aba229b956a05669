"""Activations of an expert's hidden layer, for autograd and for hand-written forward and backward passes.

A gated activation, such as SwiGLU (Shazeer 2020, arXiv 2002.05202), takes 2H values, the first H being the gate: act(gate) * rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An activation and its derivative.

    apply(pre): the hidden values. into(pre, hidden): writes them to `hidden`. grad(grad, pre): gradient with respect to pre; may overwrite
    `grad`. from_output: whether pre and hidden may be the same tensor, because the derivative can be computed from the hidden values.
    width: values of pre per hidden value.
    """

    apply: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], None]
    grad: Callable[[Tensor, Tensor], Tensor]
    from_output: bool = False
    width: int = 1


def _relu_grad(grad: Tensor, pre: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, pre, 0, grad_input=grad)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda pre: F.gelu(pre, approximate=approximate),
        lambda pre, hidden: torch.ops.aten.gelu.out(pre, approximate=approximate, out=hidden),
        lambda grad, pre: torch.ops.aten.gelu_backward.grad_input(grad, pre, approximate=approximate, grad_input=grad),
    )


def _gated(act: Activation) -> Activation:
    def apply(pre: Tensor) -> Tensor:
        gate, value = pre.chunk(2, -1)
        return act.apply(gate) * value

    def into(pre: Tensor, hidden: Tensor) -> None:
        gate, value = pre.chunk(2, -1)
        torch.mul(act.apply(gate), value, out=hidden)

    def grad(grad: Tensor, pre: Tensor) -> Tensor:
        gate, value = pre.chunk(2, -1)
        opened = act.apply(gate)
        return torch.cat([act.grad(grad * value, opened if act.from_output else gate.contiguous()), grad * opened], -1)

    return Activation(apply, into, grad, width=2)


_PLAIN: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda pre, hidden: torch.clamp_min(pre, 0, out=hidden), _relu_grad, from_output=True),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "silu": Activation(
        F.silu,
        lambda pre, hidden: torch.ops.aten.silu.out(pre, out=hidden),
        lambda grad, pre: torch.ops.aten.silu_backward.grad_input(grad, pre, grad_input=grad),
    ),
}
ACTIVATIONS: dict[str, Activation] = _PLAIN | {f"{name}_gated": _gated(act) for name, act in _PLAIN.items()}

# by name, since transformers has its own classes and need not be installed
_CLASSES = {
    **{"ReLU": "relu", "SiLU": "silu", "SiLUActivation": "silu"},
    **{"GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh"},
}


def activation_name(module: nn.Module) -> str | None:
    """Name in `ACTIVATIONS` of an activation module, or None if experts do not support it."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _CLASSES.get(type(module).__name__)
