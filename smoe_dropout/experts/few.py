"""A few tokens, as in generation: their experts one after another, on the weights where they lie.

Nothing is sorted and no weight is copied: with a token at a time the time is that of reading the weights. Plain autograd, whose gradients
are of the whole stack for every expert: not for training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS


def refusal(weights, device: str) -> str | None:
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    gate_NE = weights_NK.new_zeros(len(x_ND), len(weights.up_EHD)).scatter(1, indices_NK, weights_NK)
    y_ND = gate_NE @ weights.bias_down_ED
    for expert, own in _rows_by_expert(indices_NK).items():
        everyone = len(own) == len(x_ND)
        some = slice(None) if everyone else torch.tensor(own, device=x_ND.device)
        pre = torch.addmm(weights.bias_up_EH[expert], x_ND[some], weights.up_EHD[expert].t())
        hidden = F.dropout(ACTIVATIONS[weights.activation].apply(pre), weights.dropout)
        output = (hidden * gate_NE[some, expert, None]) @ weights.down_EHD[expert]
        y_ND = y_ND + output if everyone else y_ND.index_add(0, some, output)
    return y_ND


def _rows_by_expert(indices_NK: Tensor) -> dict[int, list[int]]:
    """The rows of x that chose an expert; of an expert without any if there are no rows at all, so that weights have gradients."""
    rows: dict[int, list[int]] = {}
    for row, experts in enumerate(indices_NK.tolist()):
        for expert in experts:
            rows.setdefault(expert, []).append(row)
    return rows or {0: []}
