"""Sparse experts: tokens sorted by expert, one matrix product per expert and map, the results gathered by one weighted sum.

Against the usual scatter, GEMMs, gather, weighted sum this keeps only the hidden values and indices for the backward pass (tokens are
gathered again), and combines by `embedding_bag` over the inverse permutation instead of materialising [N, K, D].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.dropout import keep_mask, kept_scale


def refusal(weights, device: str) -> str | None:
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    tensors = (weights.up_EHD, weights.bias_up_EH, weights.down_EHD, weights.bias_down_ED)
    return SortedExperts.apply(x_ND, indices_NK, weights_NK, *tensors, weights.activation, weights.dropout)


def sort_by_expert(indices_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Where each assignment goes when assignments are sorted by expert.

    Returns the token of each sorted row [M], the sorted row of each assignment [N, K], and each expert's (begin, end) among the rows.
    """
    flat_M = indices_NK.flatten()
    order_M = flat_M.to(torch.int16 if num_experts < 2**15 else torch.int64).argsort(stable=True)
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    ends = torch.bincount(flat_M, minlength=num_experts).cumsum(0).tolist()
    return order_M.div(indices_NK.shape[1], rounding_mode="floor"), row_M.view_as(indices_NK), list(zip([0, *ends], ends, strict=False))


class SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, indices_NK, weights_NK, up_EHD, bias_up_EH, down_EHD, bias_down_ED, activation, dropout):
        token_M, row_NK, spans = sort_by_expert(indices_NK, up_EHD.shape[0])
        act = ACTIVATIONS[activation]
        x_MD = x_ND.index_select(0, token_M)
        hidden_MH = x_ND.new_empty(len(token_M), up_EHD.shape[1])
        output_MD = torch.empty_like(x_MD)
        pre_MH = None if act.from_output else torch.empty_like(hidden_MH)
        keep_MH = keep_mask(hidden_MH.shape, dropout, x_ND.device) if dropout > 0 else None
        for expert, (begin, end) in enumerate(spans):
            if begin == end:
                continue
            hidden = hidden_MH[begin:end]
            torch.addmm(bias_up_EH[expert], x_MD[begin:end], up_EHD[expert].t(), out=hidden)
            if pre_MH is not None:
                pre_MH[begin:end] = hidden
            act.apply_(hidden)
            if keep_MH is not None:
                hidden.mul_(keep_MH[begin:end]).mul_(kept_scale(dropout))
            torch.addmm(bias_down_ED[expert], hidden, down_EHD[expert], out=output_MD[begin:end])
        ctx.save_for_backward(x_ND, weights_NK, up_EHD, down_EHD, bias_down_ED, token_M, row_NK, hidden_MH, pre_MH, keep_MH)
        ctx.spans, ctx.activation, ctx.dropout = spans, activation, dropout
        return _weighted_rows(row_NK, output_MD, weights_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        if torch.is_grad_enabled():
            raise RuntimeError("the sorted backend cannot be differentiated twice: use backend='reference'")
        x_ND, weights_NK, up_EHD, down_EHD, bias_down_ED, token_M, row_NK, hidden_MH, pre_MH, keep_MH = ctx.saved_tensors
        act, scale = ACTIVATIONS[ctx.activation], kept_scale(ctx.dropout)
        weight_M = weights_NK.new_empty(row_NK.numel())
        weight_M[row_NK.flatten()] = weights_NK.flatten()
        x_MD, grad_MD = x_ND.index_select(0, token_M), grad_ND.index_select(0, token_M)
        grad_weight_M = torch.zeros_like(weight_M)
        grad_up, grad_down = torch.empty_like(up_EHD), torch.empty_like(down_EHD)
        grad_bias_up, grad_bias_down = up_EHD.new_empty(up_EHD.shape[:2]), torch.empty_like(bias_down_ED)
        grad_x_MD = torch.empty_like(x_MD)
        for expert, (begin, end) in enumerate(ctx.spans):
            if begin == end:  # a zero, not a missing gradient: Adam goes on moving an expert that got no token
                for gradient in (grad_up, grad_bias_up, grad_down, grad_bias_down):
                    gradient[expert].zero_()
                continue
            rows = slice(begin, end)
            hidden, grad, weight = hidden_MH[rows], grad_MD[rows], weight_M[rows, None]
            grad_hidden = grad @ down_EHD[expert].t()
            grad_weight_M[rows] = (grad_hidden * hidden).sum(-1) + grad @ bias_down_ED[expert]
            grad = grad.mul_(weight)  # this Function's own copy
            torch.mm(hidden.t(), grad, out=grad_down[expert])
            torch.sum(grad, 0, out=grad_bias_down[expert])
            grad_hidden.mul_(weight if keep_MH is None else weight * scale)
            if keep_MH is not None and not act.from_output:  # from the output, a dropped value is a zero that the derivative sees
                grad_hidden.mul_(keep_MH[rows])
            act.grad_(grad_hidden, hidden if act.from_output else pre_MH[rows])
            torch.mm(grad_hidden.t(), x_MD[rows], out=grad_up[expert])
            torch.sum(grad_hidden, 0, out=grad_bias_up[expert])
            torch.mm(grad_hidden, up_EHD[expert], out=grad_x_MD[rows])
        grad_x = _weighted_rows(row_NK, grad_x_MD, None)
        return grad_x, None, grad_weight_M[row_NK], grad_up, grad_bias_up, grad_down, grad_bias_down, None, None


def _weighted_rows(row_NK: Tensor, values_MD: Tensor, weights_NK: Tensor | None) -> Tensor:
    """sum_k weights[n, k] * values[row[n, k]] -> [N, D]; without weights a plain sum."""
    return F.embedding_bag(row_NK, values_MD, mode="sum", per_sample_weights=weights_NK)
