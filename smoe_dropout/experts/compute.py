"""Computation of experts by a named backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from smoe_dropout.experts.choice import choose_backend
from smoe_dropout.options import ConfigError
from smoe_dropout.precision import without_autocast
from smoe_dropout.registry import BACKENDS, load


class BackendError(ConfigError, RuntimeError):
    """A backend that cannot run on this machine, or on these sizes and this precision."""


class ExpertWeights(NamedTuple):
    """Input of a backend: E_i(x) = down_i^T dropout(activation(up_i x + b_up_i)) + b_down_i. `dropout` is 0 outside training.

    ragged: whether tokens may have fewer than K experts, marked by index -1 and weight 0.
    """

    up_EHD: Tensor
    bias_up_EH: Tensor
    down_EHD: Tensor
    bias_down_ED: Tensor
    activation: str
    dropout: float
    ragged: bool = False

    def gates(self, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Gate weight of every expert for every token [N, E], 0 if not chosen."""
        gate_NE = weights_NK.new_zeros(weights_NK.shape[0], self.up_EHD.shape[0])
        return gate_NE.scatter_add(1, indices_NK.clamp(min=0), weights_NK) if self.ragged else gate_NE.scatter(1, indices_NK, weights_NK)


def named_backend(backend: str, *sizes) -> str:
    """The backend itself, or the one that "auto" selects for these sizes."""
    return choose_backend(*sizes) if backend == "auto" else backend


def compute_with(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights, backend: str, training: bool) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D], in the precision of the weights. BackendError if the backend cannot run here."""
    device, (N, k) = x_ND.device.type, indices_NK.shape
    if weights.ragged and backend == "auto":
        k = max(1, round(int((indices_NK >= 0).sum()) / max(N, 1)))  # mean
    backend = named_backend(backend, N, k, *weights.down_EHD.shape, x_ND.dtype, device, training)
    module = load(BACKENDS, "backend", backend)
    if sentence := module.refusal(weights, device):
        raise BackendError(f"experts backend {backend!r} cannot run here: {sentence}; use backend='auto'")
    with without_autocast(device):
        if weights.ragged and not getattr(module, "RAGGED", False):
            token_M, place_M = (indices_NK >= 0).nonzero(as_tuple=True)
            chosen_M1, weights_M1 = indices_NK[token_M, place_M, None], weights_NK[token_M, place_M, None]
            y_MD = module.run(x_ND[token_M], chosen_M1, weights_M1, weights._replace(ragged=False))
            return torch.zeros_like(x_ND).index_add(0, token_M, y_MD)
        return module.run(x_ND, indices_NK, weights_NK, weights)
