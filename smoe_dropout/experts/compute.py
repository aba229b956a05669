"""Computation of experts by a named backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from smoe_dropout.experts.choice import choose_backend
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import BACKENDS, load


class BackendError(ConfigError, RuntimeError):
    """A backend that cannot run on this machine, or on these sizes and this precision."""


class ExpertWeights(NamedTuple):
    """Input of a backend: E_i(x) = down_i^T dropout(activation(up_i x + b_up_i)) + b_down_i. `dropout` is 0 outside training."""

    up_EHD: Tensor
    bias_up_EH: Tensor
    down_EHD: Tensor
    bias_down_ED: Tensor
    activation: str
    dropout: float


def named_backend(backend: str, *sizes) -> str:
    """The backend itself, or the one that "auto" selects for these sizes."""
    return choose_backend(*sizes) if backend == "auto" else backend


def compute_with(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights, backend: str, training: bool) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D], in the precision of the weights. BackendError if the backend cannot run here."""
    device = x_ND.device.type
    backend = named_backend(backend, *indices_NK.shape, *weights.down_EHD.shape, x_ND.dtype, device, training)
    module = load(BACKENDS, "backend", backend)
    if sentence := module.refusal(weights, device):
        raise BackendError(f"experts backend {backend!r} cannot run here: {sentence}; use backend='auto'")
    with torch.autocast(device, enabled=False):
        return module.run(x_ND, indices_NK, weights_NK, weights)
