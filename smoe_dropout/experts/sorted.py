"""Sparse experts: tokens sorted by expert, one matrix product per expert and map, results combined by one weighted sum.

Unlike the usual scatter, GEMMs, gather and weighted sum, this gathers tokens for one expert at a time, forward and backward, so that they
stay in the cache; saves only hidden values, outputs and indices; and combines by `embedding_bag` over the inverse permutation instead of
materialising [N, K, D].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.dropout import keep_mask, kept_scale

RAGGED = True


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    tensors = (weights.up_EHD, weights.bias_up_EH, weights.down_EHD, weights.bias_down_ED)
    return SortedExperts.apply(x_ND, indices_NK, weights_NK, *tensors, weights.activation, weights.dropout, weights.ragged)


class Span(NamedTuple):
    """One expert's assignments: `tokens` in sorted order, and `rows` in padded buffers. count: assignments. size: rows with padding."""

    tokens: slice
    rows: slice
    count: int
    size: int


# Rows of an expert are padded to a multiple of this for products by oneDNN, as in bf16: it builds a kernel for every new size, which costs
# more than running it, and sizes change from step to step
ROWS = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 16}


def multiple_of_rows(dtype: torch.dtype) -> int:
    """Padding multiple for a dtype; 1 where new sizes cost nothing: torch's own float32 products, and other dtypes."""
    own = dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # tune_cpu sets it
    return 1 if own else ROWS.get(dtype, 1)


def sort_by_expert(indices_NK: Tensor, num_experts: int, multiple: int = 1, ragged: bool = False) -> tuple[Tensor, Tensor, list[Span]]:
    """Sort assignments by expert, padding each expert's rows to a multiple.

    Returns the token of each sorted assignment [M], the row of each assignment [N, K], and each expert's span. Those with index -1 are left
    out, and get a row behind all others.
    """
    flat_M = indices_NK.flatten()
    order_M = flat_M.to(torch.int16 if num_experts < 2**15 else torch.int64).argsort(stable=True)
    if ragged:
        absent, *counts = torch.bincount(flat_M + 1, minlength=num_experts + 1).tolist()
        order_M = order_M[absent:]
    else:
        counts = torch.bincount(flat_M, minlength=num_experts).tolist()
    spans, token, row = [], 0, 0
    for count in counts:
        size = -(-count // multiple) * multiple
        spans.append(Span(slice(token, token + count), slice(row, row + size), count, size))
        token, row = token + count, row + size
    row_M = torch.full_like(flat_M, row) if ragged else torch.empty_like(order_M)
    row_M[order_M] = torch.cat([torch.arange(span.rows.start, span.rows.start + span.count) for span in spans]).to(order_M.device)
    return order_M.div(indices_NK.shape[1], rounding_mode="floor"), row_M.view_as(indices_NK), spans


class SortedExperts(torch.autograd.Function):
    """Computed expert by expert. All experts share one buffer for temporaries, since fresh memory costs page faults on a CPU."""

    @staticmethod
    def forward(ctx, x_ND, indices_NK, weights_NK, up_EHD, bias_up_EH, down_EHD, bias_down_ED, activation, dropout, ragged):
        """Output [N, D]."""
        token_M, row_NK, spans = sort_by_expert(indices_NK, up_EHD.shape[0], multiple_of_rows(x_ND.dtype), ragged)
        act, (_, H, D), total = ACTIVATIONS[activation], down_EHD.shape, spans[-1].rows.stop
        hidden_MH, output_MD = x_ND.new_empty(total, H), x_ND.new_empty(total + ragged, D)
        output_MD[total:].zero_()  # of assignments that are left out
        pre_MP = hidden_MH if act.from_output else x_ND.new_empty(total, up_EHD.shape[1])
        keep_MH = keep_mask(hidden_MH.shape, dropout, x_ND.device) if dropout > 0 else None
        own_x = _buffer(x_ND, spans, D)
        for expert, span in enumerate(spans):
            if span.count == 0:
                continue
            rows, x, hidden = span.rows, _gather(x_ND, token_M, span, own_x), hidden_MH[span.rows]
            act.into(torch.addmm(bias_up_EH[expert], x, up_EHD[expert].t(), out=pre_MP[rows]), hidden)
            if keep_MH is not None:
                hidden.mul_(keep_MH[rows]).mul_(kept_scale(dropout))
            torch.addmm(bias_down_ED[expert], hidden, down_EHD[expert], out=output_MD[rows])
        ctx.save_for_backward(x_ND, weights_NK, up_EHD, down_EHD, token_M, row_NK, hidden_MH, output_MD, pre_MP, keep_MH)
        ctx.spans, ctx.activation, ctx.dropout = spans, activation, dropout
        return _weighted_rows(row_NK, output_MD, weights_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        """Gradients of the inputs of `forward`."""
        if torch.is_grad_enabled():
            raise RuntimeError("the sorted backend cannot be differentiated twice: use backend='reference'")
        x_ND, weights_NK, up_EHD, down_EHD, token_M, row_NK, hidden_MH, output_MD, pre_MP, keep_MH = ctx.saved_tensors
        act, (E, H, D) = ACTIVATIONS[ctx.activation], down_EHD.shape
        weight_M = weights_NK.new_zeros(len(output_MD))
        weight_M[row_NK.flatten()] = weights_NK.flatten()
        grad_weight_M, grad_x_MD = torch.empty_like(weight_M), torch.empty_like(output_MD)
        for gradient in (grad_weight_M, grad_x_MD):
            gradient[len(hidden_MH) :].zero_()
        grad_up, grad_down = torch.empty_like(up_EHD), torch.empty_like(down_EHD)
        grad_bias_up, grad_bias_down = up_EHD.new_empty(up_EHD.shape[:2]), up_EHD.new_empty(E, D)
        own_grad, own_x, own_hidden = (_buffer(x_ND, ctx.spans, width) for width in (D, D, H))
        for expert, span in enumerate(ctx.spans):
            if span.count == 0:  # a zero, not a missing gradient, so that Adam keeps moving an expert without tokens
                for gradient in (grad_up, grad_bias_up, grad_down, grad_bias_down):
                    gradient[expert].zero_()
                continue
            rows, grad = span.rows, _gather(grad_ND, token_M, span, own_grad)
            torch.sum(torch.mul(grad, output_MD[rows], out=own_x[: span.size]), -1, out=grad_weight_M[rows])
            grad.mul_(weight_M[rows, None])  # scaled here, D wide, rather than after the next product, H wide
            torch.mm(hidden_MH[rows].t(), grad, out=grad_down[expert])
            torch.sum(grad, 0, out=grad_bias_down[expert])
            grad_hidden = torch.mm(grad, down_EHD[expert].t(), out=own_hidden[: span.size])
            if keep_MH is not None:
                # with from_output, dropped values are zero among the hidden values, and so is the derivative there
                grad_hidden.mul_(kept_scale(ctx.dropout) if act.from_output else keep_MH[rows] * kept_scale(ctx.dropout))
            grad_pre = act.grad(grad_hidden, pre_MP[rows])
            x = _gather(x_ND, token_M, span, own_x)
            torch.mm(grad_pre.t(), x, out=grad_up[expert])
            torch.sum(grad_pre, 0, out=grad_bias_up[expert])
            torch.mm(grad_pre, up_EHD[expert], out=grad_x_MD[rows])
        grad_x = _weighted_rows(row_NK, grad_x_MD, None)
        return grad_x, None, grad_weight_M[row_NK], grad_up, grad_bias_up, grad_down, grad_bias_down, None, None, None


def _gather(values_ND: Tensor, token_M: Tensor, span: Span, room: Tensor) -> Tensor:
    """Values of an expert's tokens, padded with zeros [span.size, D], written to `room`."""
    torch.index_select(values_ND, 0, token_M[span.tokens], out=room[: span.count])
    room[span.count : span.size].zero_()
    return room[: span.size]


def _buffer(values: Tensor, spans: list[Span], width: int) -> Tensor:
    """Buffer that fits any one expert [largest span.size, width], in the precision of `values`."""
    return values.new_empty(max(span.size for span in spans), width)


def _weighted_rows(row_NK: Tensor, values_MD: Tensor, weights_NK: Tensor | None) -> Tensor:
    """sum_k weights[n, k] * values[row[n, k]] -> [N, D]; without weights a plain sum."""
    return F.embedding_bag(row_NK, values_MD, mode="sum", per_sample_weights=weights_NK)
