"""Activations of an expert's hidden layer, for autograd and for hand-written forward and backward passes.

A gated activation, such as SwiGLU (Shazeer 2020, arXiv 2002.05202), takes 2H values, the first H being the gate: act(gate) * rest.

`ACTIVATIONS["mine"] = Activation.of(function)` adds one, and `ACTIVATIONS["mine_gated"] = gated(ACTIVATIONS["mine"])` its gated form, in
every process that converts or loads such a model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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

    @classmethod
    def of(cls, apply: Callable[[Tensor], Tensor], grad: Callable[[Tensor, Tensor], Tensor] | None = None) -> "Activation":
        """An elementwise function without parameters; its gradient comes from autograd unless `grad` is given."""

        def by_autograd(grad: Tensor, pre: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = pre.detach().requires_grad_()
                return torch.autograd.grad(apply(leaf), leaf, grad)[0]

        return cls(apply, lambda pre, hidden: hidden.copy_(apply(pre)), grad or by_autograd)


def _relu_grad(grad: Tensor, pre: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, pre, 0, grad_input=grad)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda pre: F.gelu(pre, approximate=approximate),
        lambda pre, hidden: torch.ops.aten.gelu.out(pre, approximate=approximate, out=hidden),
        lambda grad, pre: torch.ops.aten.gelu_backward.grad_input(grad, pre, approximate=approximate, grad_input=grad),
    )


def gated(act: Activation) -> Activation:
    """The gated form of an activation."""

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


def _quick_gelu_grad(grad: Tensor, pre: Tensor) -> Tensor:
    share = torch.sigmoid(1.702 * pre)
    return grad * (share + 1.702 * pre * share * (1 - share))


def _clipped_gelu_grad(grad: Tensor, pre: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad * (F.gelu(pre).abs() <= 10), pre)


LAPLACE_MEAN, LAPLACE_STD = 0.707107, 0.282095  # transformers' constants: Mega, arXiv 2209.10655, appendix D


def _laplace(pre: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((pre - LAPLACE_MEAN) / (LAPLACE_STD * math.sqrt(2))))


def _laplace_grad(grad: Tensor, pre: Tensor) -> Tensor:
    return grad * torch.exp(-0.5 * ((pre - LAPLACE_MEAN) / LAPLACE_STD) ** 2) / (LAPLACE_STD * math.sqrt(2 * math.pi))


def _sqrt_softplus_grad(grad: Tensor, pre: Tensor) -> Tensor:
    return grad * torch.sigmoid(pre) / (2 * F.softplus(pre).sqrt())


_ATEN = torch.ops.aten
_PLAIN: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda pre, hidden: torch.clamp_min(pre, 0, out=hidden), _relu_grad, from_output=True),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "silu": Activation(
        F.silu,
        lambda pre, hidden: torch.ops.aten.silu.out(pre, out=hidden),
        lambda grad, pre: torch.ops.aten.silu_backward.grad_input(grad, pre, grad_input=grad),
    ),
    "quick_gelu": Activation.of(lambda pre: pre * torch.sigmoid(1.702 * pre), _quick_gelu_grad),
    "relu2": Activation.of(lambda pre: F.relu(pre).square(), lambda grad, pre: grad * (2 * F.relu(pre))),
    "relu6": Activation.of(F.relu6, lambda grad, pre: _ATEN.hardtanh_backward(grad, pre, 0, 6)),
    "gelu_clipped": Activation.of(lambda pre: F.gelu(pre).clamp(-10, 10), _clipped_gelu_grad),
    "laplace": Activation.of(_laplace, _laplace_grad),
    "mish": Activation.of(F.mish, lambda grad, pre: _ATEN.mish_backward(grad, pre)),
    "tanh": Activation.of(torch.tanh, lambda grad, pre: _ATEN.tanh_backward(grad, torch.tanh(pre))),
    "sigmoid": Activation.of(torch.sigmoid, lambda grad, pre: _ATEN.sigmoid_backward(grad, torch.sigmoid(pre))),
    "leaky_relu": Activation.of(F.leaky_relu, lambda grad, pre: _ATEN.leaky_relu_backward(grad, pre, 0.01, False)),
    "hardswish": Activation.of(F.hardswish, lambda grad, pre: _ATEN.hardswish_backward(grad, pre)),
    "elu": Activation.of(F.elu, lambda grad, pre: _ATEN.elu_backward(grad, 1, 1, 1, False, pre)),
    "softplus": Activation.of(F.softplus, lambda grad, pre: _ATEN.softplus_backward(grad, pre, 1, 20)),
    "sqrt_softplus": Activation.of(lambda pre: F.softplus(pre).sqrt(), _sqrt_softplus_grad),
    "linear": Activation.of(lambda pre: pre, lambda grad, pre: grad),
}
ACTIVATIONS: dict[str, Activation] = _PLAIN | {f"{name}_gated": gated(act) for name, act in _PLAIN.items()}
