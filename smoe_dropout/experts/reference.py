"""The definition of the experts' computation: one expert after another, plain autograd, any precision. Slow."""

import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS

RAGGED = True


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    y_ND = x_ND.new_zeros(x_ND.shape)
    activation = ACTIVATIONS[weights.activation].apply
    for expert in range(weights.up_EHD.shape[0]):
        token, slot = (indices_NK == expert).nonzero(as_tuple=True)
        hidden = activation(F.linear(x_ND[token], weights.up_EHD[expert], weights.bias_up_EH[expert]))
        hidden = F.dropout(hidden, weights.dropout)
        output = hidden @ weights.down_EHD[expert] + weights.bias_down_ED[expert]
        y_ND = y_ND.index_add(0, token, output * weights_NK[token, slot, None])
    return y_ND
