"""E feed-forward experts with stacked parameters, and the backends that compute them.

Shape suffixes: N tokens, K active experts, D model width, E experts, H hidden width of one expert, M = N * K assignments.

Both maps are stored as [E, H, D]: a slice is one expert, and the view [E * H, D] is the dense FFN that the experts form together. With a
gated activation `up` is [E, 2H, D], the gate's rows first, so that one product computes both.

A backend is a module of this package with two functions, and all backends give the same outputs and gradients as `reference`:
    run(x_ND, indices_NK, weights_NK, weights: ExpertWeights) -> Tensor [N, D]
    refusal(weights, device) -> str | None, the reason why it cannot run on these weights or this device type
A backend with `RAGGED = True` reads `weights.ragged`; to others the assignments of ragged tokens are given as tokens with one expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.experts import plain
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.compiled import opaque
from smoe_dropout.experts.compute import ExpertWeights, compute_with, named_backend
from smoe_dropout.registry import BACKENDS, unknown

__all__ = ["ExpertWeights", "Experts"]


class Experts(nn.Module):
    """(tokens [N, D], indices [N, K], weights [N, K]) -> sum over the chosen experts of weight * E_i(token) [N, D].

    Raises ValueError for an unknown activation or backend, and RuntimeError if the backend cannot run here.
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

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, ragged: bool = False) -> Tensor:
        """Weighted sum of the chosen experts' outputs [N, D], in autocast's precision where that is enabled.

        ragged: whether indices may be -1, for tokens with fewer than K experts.
        """
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        arguments = x_ND.to(dtype), indices_NK, weights_NK.to(dtype), self.weights(dtype)._replace(ragged=ragged)
        if plain.needed():
            return plain.run(*arguments)
        compute = opaque if torch.compiler.is_compiling() else compute_with
        return compute(*arguments, self.backend, torch.is_grad_enabled())

    def each(self, x_ND: Tensor) -> Tensor:
        """Outputs of all experts for all tokens [N, E, D], by plain autograd."""
        w = self.weights(torch.get_autocast_dtype(x_ND.device.type) if torch.is_autocast_enabled(x_ND.device.type) else x_ND.dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            x_END = x_ND.to(w.up_EHD.dtype).expand(len(w.up_EHD), -1, -1)
            hidden_ENH = ACTIVATIONS[w.activation].apply(torch.baddbmm(w.bias_up_EH[:, None], x_END, w.up_EHD.transpose(1, 2)))
            return torch.baddbmm(w.bias_down_ED[:, None], F.dropout(hidden_ENH, w.dropout), w.down_EHD).transpose(0, 1)

    def backend_for(self, tokens: int, k: int, dtype: torch.dtype) -> str:
        """Name of the backend used for this many tokens and active experts, in the current grad mode."""
        return named_backend(self.backend, tokens, k, *self.down.shape, dtype, self.up.device.type, torch.is_grad_enabled())

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The parameters in the given precision, with the activation and the current dropout."""
        tensors = self.up, self.bias_up, self.down, self.bias_down
        if any(parameter.dtype != dtype for parameter in tensors):
            tensors = [parameter.to(dtype) for parameter in tensors]
        return ExpertWeights(*tensors, activation=self.activation, dropout=self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        """Sizes and settings, for `print(model)`."""
        E, H, D = self.down.shape
        return f"num_experts={E}, d_model={D}, d_expert={H}, activation={self.activation}, dropout={self.dropout}, backend={self.backend}"
