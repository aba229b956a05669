"""Activations of an expert's hidden layer: what autograd applies, and the derivative the hand-written backward passes use."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """`apply(pre)` gives the hidden values, `apply_(pre)` the same overwriting its input, `grad_(grad, pre)` overwrites grad with the
    gradient to pre. `from_output`: the derivative may be taken at the hidden values instead of pre, so pre need not be kept.
    """

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    grad_: Callable[[Tensor, Tensor], Tensor]
    from_output: bool


def _relu_grad_(grad: Tensor, pre: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, pre, 0, grad_input=grad)


def _tanh_gelu(pre: Tensor) -> Tensor:
    return F.gelu(pre, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, torch.relu_, _relu_grad_, from_output=True),
    "gelu": Activation(F.gelu, lambda pre: pre.copy_(F.gelu(pre)), lambda g, pre: g.copy_(torch.ops.aten.gelu_backward(g, pre)), False),
    "gelu_tanh": Activation(
        _tanh_gelu,
        lambda pre: pre.copy_(_tanh_gelu(pre)),
        lambda g, pre: g.copy_(torch.ops.aten.gelu_backward(g, pre, approximate="tanh")),
        False,
    ),
    "silu": Activation(F.silu, lambda pre: F.silu(pre, inplace=True), lambda g, pre: g.copy_(torch.ops.aten.silu_backward(g, pre)), False),
}


# by name, since transformers has its own classes for these and need not be installed
_CLASSES = {
    **{"ReLU": "relu", "SiLU": "silu", "SiLUActivation": "silu"},
    **{"GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh"},
}


def activation_name(module: nn.Module) -> str | None:
    """The name of an activation module in `ACTIVATIONS`, or None for one that experts cannot compute."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _CLASSES.get(type(module).__name__)
