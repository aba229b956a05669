"""Experts under torch.compile: one operator that is opaque to the compiler, for every backend.

If traced, the loops over experts would become graphs of thousands of nodes, one per k, and `sorted` could not be traced at all because its
sizes depend on the data. The backward pass recomputes the hidden values, as activation checkpointing does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from smoe_dropout.experts.compute import ExpertWeights, compute_with


def opaque(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights, backend: str, training: bool) -> Tensor:
    """`compute_with` as an opaque operator. Dropout is drawn from a seed taken from torch's default generator."""
    tensors = (weights.up_EHD, weights.bias_up_EH, weights.down_EHD, weights.bias_down_ED)
    seed = torch.randint(2**62, ()) if weights.dropout > 0 else torch.zeros((), dtype=torch.int64)
    return _experts(x_ND, indices_NK, weights_NK, *tensors, seed, backend, training, weights.activation, weights.dropout, weights.ragged)


@torch.library.custom_op("smoe_dropout::experts", mutates_args=())
def _experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    bias_up: Tensor,
    down: Tensor,
    bias_down: Tensor,
    seed: Tensor,
    backend: str,
    training: bool,
    activation: str,
    dropout: float,
    ragged: bool,
) -> Tensor:
    with _seeded(seed, dropout, x.device):
        return _run(x, indices, weights, (up, bias_up, down, bias_down), backend, training, activation, dropout, ragged).contiguous()


@torch.library.custom_op("smoe_dropout::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    bias_up: Tensor,
    down: Tensor,
    bias_down: Tensor,
    seed: Tensor,
    backend: str,
    training: bool,
    activation: str,
    dropout: float,
    ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weights, *tensors = (tensor.detach().requires_grad_() for tensor in (x, weights, up, bias_up, down, bias_down))
    with _seeded(seed, dropout, x.device), _recorded():
        y = _run(x, indices, weights, tensors, backend, training, activation, dropout, ragged)
    return tuple(gradient.contiguous() for gradient in torch.autograd.grad(y, (x, weights, *tensors), grad))


def _run(x: Tensor, indices: Tensor, weights: Tensor, tensors, backend: str, training: bool, *settings) -> Tensor:
    return compute_with(x, indices, weights, ExpertWeights(*tensors, *settings), backend, training)


@contextmanager
def _recorded() -> Iterator[None]:
    """Re-enable autograd, which torch disables inside an operator whatever the grad mode."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.ADInplaceOrView
    )
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - keys), torch.enable_grad():
        yield


@contextmanager
def _seeded(seed: Tensor, dropout: float, device: torch.device) -> Iterator[None]:
    """Seed the random generators for the block and restore them afterwards."""
    if dropout == 0:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


@_experts.register_fake
def _(x, *_rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_experts_backward.register_fake
def _(grad, x, indices, weights, up, bias_up, down, bias_down, *_rest):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, weights, up, bias_up, down, bias_down))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _backward(ctx, grad):
    gradients = _experts_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return gradients[0], None, *gradients[1:], None, None, None, None, None, None


_experts.register_autograd(_backward, setup_context=_keep)
