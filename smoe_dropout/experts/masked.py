"""Dense experts: every token through every expert, with weight 0 for those not chosen. For k near E, or experts too small to gather for.

Needs no gathering, sorting or synchronisation. The work is that of the dense FFN for any k.
"""

import torch
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.dropout import keep_mask, kept_scale

RAGGED = True


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    gate_NE = weights.gates(indices_NK, weights_NK)
    tensors = (weights.up_EHD, weights.bias_up_EH, weights.down_EHD, weights.bias_down_ED)
    return MaskedExperts.apply(x_ND, gate_NE, *tensors, weights.activation, weights.dropout)


class MaskedExperts(torch.autograd.Function):
    """gate [N, E]: gate weight of each expert, 0 if not chosen. Computed expert by expert, so that temporaries stay in the cache."""

    @staticmethod
    def forward(ctx, x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, activation, dropout):
        """Output [N, D]."""
        act, (E, H, _), N = ACTIVATIONS[activation], down_EHD.shape, len(x_ND)
        hidden_ENH = x_ND.new_empty(E, N, H)
        pre_ENP = hidden_ENH if act.from_output else x_ND.new_empty(E, N, up_EHD.shape[1])
        keep_ENH = keep_mask(hidden_ENH.shape, dropout, x_ND.device) if dropout > 0 else None
        y_ND, weighted = gate_NE @ bias_down_ED, torch.empty_like(hidden_ENH[0])
        for expert in range(E):
            hidden = hidden_ENH[expert]
            act.into(torch.addmm(bias_up_EH[expert], x_ND, up_EHD[expert].t(), out=pre_ENP[expert]), hidden)
            if keep_ENH is not None:
                hidden.mul_(keep_ENH[expert]).mul_(kept_scale(dropout))
            y_ND.addmm_(torch.mul(hidden, gate_NE[:, expert, None], out=weighted), down_EHD[expert])
        ctx.save_for_backward(x_ND, gate_NE, up_EHD, down_EHD, bias_down_ED, hidden_ENH, pre_ENP, keep_ENH)
        ctx.activation, ctx.dropout = activation, dropout
        return y_ND

    @staticmethod
    def backward(ctx, grad_ND):
        """Gradients of the inputs of `forward`."""
        if torch.is_grad_enabled():
            raise RuntimeError("the masked backend cannot be differentiated twice: use backend='reference'")
        x_ND, gate_NE, up_EHD, down_EHD, bias_down_ED, hidden_ENH, pre_ENP, keep_ENH = ctx.saved_tensors
        act, scale = ACTIVATIONS[ctx.activation], kept_scale(ctx.dropout)
        grad_gate = grad_ND @ bias_down_ED.t()
        grad_up, grad_down = torch.empty_like(up_EHD), torch.empty_like(down_EHD)
        grad_bias_up, grad_bias_down = up_EHD.new_empty(up_EHD.shape[:2]), gate_NE.t() @ grad_ND
        grad_x, grad_hidden, product = torch.zeros_like(x_ND), torch.empty_like(hidden_ENH[0]), torch.empty_like(hidden_ENH[0])
        for expert in range(up_EHD.shape[0]):
            hidden, gate = hidden_ENH[expert], gate_NE[:, expert, None]
            torch.mm(grad_ND, down_EHD[expert].t(), out=grad_hidden)
            grad_gate[:, expert] += torch.mul(grad_hidden, hidden, out=product).sum(-1)
            torch.mul(hidden, gate, out=product)
            torch.mm(product.t(), grad_ND, out=grad_down[expert])
            grad_hidden.mul_(gate if keep_ENH is None else gate * scale)
            if keep_ENH is not None and not act.from_output:
                grad_hidden.mul_(keep_ENH[expert])
            grad_pre = act.grad(grad_hidden, pre_ENP[expert])
            torch.mm(grad_pre.t(), x_ND, out=grad_up[expert])
            torch.sum(grad_pre, 0, out=grad_bias_up[expert])
            grad_x.addmm_(grad_pre, up_EHD[expert])
        return grad_x, grad_gate, grad_up, grad_bias_up, grad_down, grad_bias_down, None, None
