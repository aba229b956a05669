"""E feed-forward experts with stacked parameters, and the ways to compute them.

Shape suffixes: N tokens, K active experts, D model width, E experts, H hidden width of one expert, M = N * K assignments.

Both maps are stored [E, H, D]: a slice is one expert, and the view [E * H, D] is the dense FFN that the experts make up together. With a
gated activation `up` is [E, 2H, D], the rows of the gate before the others, so that one product makes both. Every way
(a module in this package with `run` and `refusal`) gives the same outputs and gradients; `reference` is the definition.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.choice import choose_backend
from smoe_dropout.experts.compiled import opaque
from smoe_dropout.registry import BACKENDS, load, unknown


class ExpertWeights(NamedTuple):
    """What a backend computes with: E_i(x) = down_i^T dropout(activation(up_i x + b_up_i)) + b_down_i."""

    up_EHD: Tensor
    bias_up_EH: Tensor
    down_EHD: Tensor
    bias_down_ED: Tensor
    activation: str
    dropout: float  # 0 outside training


def named_backend(backend: str, *sizes) -> str:
    """The backend itself, or what "auto" stands for at these sizes."""
    return choose_backend(*sizes) if backend == "auto" else backend


def compute_with(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights, backend: str, training: bool) -> Tensor:
    """By the backend, all in the precision of the weights. RuntimeError when it cannot run here."""
    device = x_ND.device.type
    backend = named_backend(backend, *indices_NK.shape, *weights.down_EHD.shape, x_ND.dtype, device, training)
    module = load(BACKENDS, "backend", backend)
    if sentence := module.refusal(weights, device):
        raise RuntimeError(f"experts backend {backend!r} cannot run here: {sentence}; backend='auto' always can")
    with torch.autocast(device, enabled=False):
        return module.run(x_ND, indices_NK, weights_NK, weights)


class Experts(nn.Module):
    """(tokens [N, D], indices [N, K], weights [N, K]) -> sum over the chosen experts of weight * E_i(token) [N, D].

    Raises ValueError for an unknown activation or backend, RuntimeError when the backend asked for cannot run here.
    """

    def __init__(self, num_experts: int, d_model: int, d_expert: int, activation: str, dropout: float, backend: str, init_std: float):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", activation, ACTIVATIONS))
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(unknown("backend", backend, ["auto", *BACKENDS]))
        self.activation, self.dropout, self.backend = activation, dropout, backend
        width = d_expert * ACTIVATIONS[activation].width
        self.up = nn.Parameter(torch.empty(num_experts, width, d_model).normal_(0.0, init_std))
        self.bias_up = nn.Parameter(torch.zeros(num_experts, width))
        self.down = nn.Parameter(torch.empty(num_experts, d_expert, d_model).normal_(0.0, init_std))
        self.bias_down = nn.Parameter(torch.zeros(num_experts, d_model))

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        compute = opaque if torch.compiler.is_compiling() else compute_with
        return compute(x_ND.to(dtype), indices_NK, weights_NK.to(dtype), self.weights(dtype), self.backend, torch.is_grad_enabled())

    def each(self, x_ND: Tensor) -> Tensor:
        """Every expert's output for every token [N, E, D], by plain autograd."""
        w = self.weights(torch.get_autocast_dtype(x_ND.device.type) if torch.is_autocast_enabled(x_ND.device.type) else x_ND.dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            x_END = x_ND.to(w.up_EHD.dtype).expand(len(w.up_EHD), -1, -1)
            hidden_ENH = ACTIVATIONS[w.activation].apply(torch.baddbmm(w.bias_up_EH[:, None], x_END, w.up_EHD.transpose(1, 2)))
            return torch.baddbmm(w.bias_down_ED[:, None], F.dropout(hidden_ENH, w.dropout), w.down_EHD).transpose(0, 1)

    def backend_for(self, tokens: int, k: int, dtype: torch.dtype) -> str:
        """The backend that computes so many tokens with k active experts, with gradients or, where autograd is off, without."""
        return named_backend(self.backend, tokens, k, *self.down.shape, dtype, self.up.device.type, torch.is_grad_enabled())

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        tensors = (parameter.to(dtype) for parameter in (self.up, self.bias_up, self.down, self.bias_down))
        return ExpertWeights(*tensors, activation=self.activation, dropout=self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        E, H, D = self.down.shape
        return f"num_experts={E}, d_model={D}, d_expert={H}, activation={self.activation}, dropout={self.dropout}, backend={self.backend}"
