"""Experts for a few tokens, as in generation: one expert after another, or all at once if most are active.

Nothing is sorted and no weight is copied: for a token at a time the cost is reading the weights and launching each product. On a CPU dot
products with rows and sums over rows read them for all chosen experts at once (`single_position`). Uses plain autograd, which builds a
gradient of the whole stack for every expert, so it is not meant for training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.plain import gated
from smoe_dropout.single_position import dots, numbered, sums

RAGGED = True

MOST = 0.6  # fraction of active experts from which one product with all of them is faster than a product for each


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    if _summed(indices_NK, weights):
        return _pairs(x_ND, indices_NK, weights_NK, weights)
    gate_NE = weights.gates(indices_NK, weights_NK)
    rows = _rows_by_expert(indices_NK)
    if len(rows) >= MOST * len(weights.up_EHD):
        return gated(x_ND, gate_NE, weights)
    y_ND = gate_NE @ weights.bias_down_ED
    for expert, own in rows.items():
        everyone = len(own) == len(x_ND)
        some = slice(None) if everyone else torch.tensor(own, dtype=torch.int64, device=x_ND.device)
        pre = torch.addmm(weights.bias_up_EH[expert], x_ND[some], weights.up_EHD[expert].t())
        hidden = F.dropout(ACTIVATIONS[weights.activation].apply(pre), weights.dropout)
        output = (hidden * gate_NE[some, expert, None]) @ weights.down_EHD[expert]
        y_ND = y_ND + output if everyone else y_ND.index_add(0, some, output)
    return y_ND


def _summed(indices_NK: Tensor, weights) -> bool:
    """Return whether sums over rows are faster than matrix products; their gradient cannot be differentiated again."""
    if torch.is_grad_enabled() or weights.up_EHD.dtype != torch.float32 or weights.up_EHD.device.type != "cpu":
        return False
    return 0 < indices_NK.numel() <= len(weights.up_EHD)


def _pairs(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum over each token's experts."""
    N, H, width = len(x_ND), weights.down_EHD.shape[1], weights.up_EHD.shape[1]
    experts_P, weights_P, begin_N, counts_N = chosen(indices_NK, weights_NK, weights.ragged)
    rows_M = rows_of(experts_P, width, len(weights.up_EHD))
    token_M = numbered(len(rows_M))[1] if N == 1 else torch.arange(N).repeat_interleave(counts_N * width)
    pre_PW = dots(x_ND, weights.up_EHD.flatten(0, 1), rows_M, token_M).view(-1, width)
    hidden_PH = ACTIVATIONS[weights.activation].apply(pre_PW.add_(weights.bias_up_EH.index_select(0, experts_P)))
    if weights.dropout:
        hidden_PH = F.dropout(hidden_PH, weights.dropout)
    rows_M = rows_M if width == H else rows_of(experts_P, H, len(weights.up_EHD))
    scale_M = (hidden_PH * weights_P[:, None]).view(-1)
    y_ND = sums(weights.down_EHD.flatten(0, 1), rows_M, begin_N * H, scale_M)
    return y_ND.add_(sums(weights.bias_down_ED, experts_P, begin_N, weights_P))


def chosen(indices_NK: Tensor, weights_NK: Tensor, ragged: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
    """Experts and weights of all tokens in turn [P], where those of each token begin [N], and their number [N], or K if not ragged."""
    N, K = indices_NK.shape
    experts_P, weights_P = indices_NK.flatten(), weights_NK.flatten()
    if not ragged:
        return experts_P, weights_P, torch.arange(0, N * K, K), K
    active_P, counts_N = experts_P >= 0, (indices_NK >= 0).sum(1)
    return experts_P[active_P], weights_P[active_P], counts_N.cumsum(0) - counts_N, counts_N


def rows_of(experts_P: Tensor, width: int, count: int) -> Tensor:
    """Rows of the chosen experts, of `count`, in maps that are stacked [E * width, ...] [P * width]."""
    return numbered(count * width)[0].view(count, width).index_select(0, experts_P).view(-1)


def _rows_by_expert(indices_NK: Tensor) -> dict[int, list[int]]:
    """Rows of x by chosen expert. Without any rows, expert 0 with an empty list, so that the weights still receive gradients."""
    rows: dict[int, list[int]] = {}
    for row, experts in enumerate(indices_NK.tolist()):
        for expert in experts:
            if expert >= 0:
                rows.setdefault(expert, []).append(row)
    return rows or {0: []}
