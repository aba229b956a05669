"""Experts for a few tokens, as in generation: one expert after another, or all at once if most are active.

Nothing is sorted and no weight is copied: for a token at a time the cost is reading the weights and launching each product. A CPU's
matrix-vector product reads them at a third of the memory bandwidth; a sum over rows, as in an embedding bag, is faster. Uses plain
autograd, which builds a gradient of the whole stack for every expert, so it is not meant for training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.plain import gated

RAGGED = True

MOST = 0.6  # fraction of active experts from which one product with all of them is faster than a product for each
NARROW = 2**19  # weights of a map up to which elementwise products that are summed afterwards stay in the cache


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    gate_NE = weights.gates(indices_NK, weights_NK)
    if _summed(indices_NK, weights):
        return _pairs(x_ND, indices_NK, weights_NK, weights) + gate_NE @ weights.bias_down_ED
    rows = _rows_by_expert(indices_NK)
    if len(rows) >= MOST * len(weights.up_EHD):
        return gated(x_ND, gate_NE, weights)
    y_ND = gate_NE @ weights.bias_down_ED
    for expert, own in rows.items():
        everyone = len(own) == len(x_ND)
        some = slice(None) if everyone else torch.tensor(own, device=x_ND.device)
        pre = torch.addmm(weights.bias_up_EH[expert], x_ND[some], weights.up_EHD[expert].t())
        hidden = F.dropout(ACTIVATIONS[weights.activation].apply(pre), weights.dropout)
        output = (hidden * gate_NE[some, expert, None]) @ weights.down_EHD[expert]
        y_ND = y_ND + output if everyone else y_ND.index_add(0, some, output)
    return y_ND


def _summed(indices_NK: Tensor, weights) -> bool:
    """Whether sums over rows are faster than matrix products; their gradient cannot be differentiated again."""
    if torch.is_grad_enabled() or weights.up_EHD.dtype != torch.float32 or weights.up_EHD.device.type != "cpu":
        return False
    return 0 < indices_NK.numel() <= len(weights.up_EHD) and weights.up_EHD[0].numel() <= NARROW


def _pairs(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum over each token's experts, without the output bias."""
    E, H, D = weights.down_EHD.shape
    pairs = [(row, expert) for row, experts in enumerate(indices_NK.tolist()) for expert in experts if expert >= 0]
    pre_PH = torch.stack([torch.linalg.vecdot(weights.up_EHD[expert], x_ND[row]) for row, expert in pairs])
    experts_P, weights_P, offsets_N = indices_NK.flatten(), weights_NK.flatten(), None
    if weights.ragged:
        active_NK = indices_NK >= 0
        experts_P, weights_P = indices_NK[active_NK], weights_NK[active_NK]
        counts_N = active_NK.sum(1)
        offsets_N = (counts_N.cumsum(0) - counts_N) * H
    hidden_PH = F.dropout(ACTIVATIONS[weights.activation].apply(pre_PH + weights.bias_up_EH[experts_P]), weights.dropout)
    scale_PH, units_PH = hidden_PH * weights_P[:, None], experts_P[:, None] * H + torch.arange(H)
    shape = (len(x_ND), -1) if offsets_N is None else (-1,)
    maps = weights.down_EHD.view(E * H, D)
    return F.embedding_bag(units_PH.view(shape), maps, offsets_N, mode="sum", per_sample_weights=scale_PH.view(shape))


def _rows_by_expert(indices_NK: Tensor) -> dict[int, list[int]]:
    """Rows of x by chosen expert. Without any rows, expert 0 with an empty list, so that the weights still receive gradients."""
    rows: dict[int, list[int]] = {}
    for row, experts in enumerate(indices_NK.tolist()):
        for expert in experts:
            if expert >= 0:
                rows.setdefault(expert, []).append(row)
    return rows or {0: []}
