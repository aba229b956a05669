"""Sparse experts by torch's grouped matrix product: two calls for all experts, with group ends on the device. Plain autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    dtype, (_, H, D) = weights.up_EHD.dtype, weights.down_EHD.shape
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not support {dtype}"
    if any(size * dtype.itemsize % 16 for size in (H, D)):
        return f"grouped_mm needs rows of a multiple of 16 bytes, unlike d_expert = {H}, d_model = {D} in {dtype}"
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    expert_M, order_M = indices_NK.flatten().sort(stable=True)
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    experts_E = torch.arange(weights.up_EHD.shape[0], device=expert_M.device)
    ends_E = torch.searchsorted(expert_M, experts_E, right=True, out_int32=True)  # bincount would synchronise with the device
    x_MD = x_ND[order_M.div(indices_NK.shape[1], rounding_mode="floor")]
    hidden = F.grouped_mm(x_MD, weights.up_EHD.transpose(1, 2), offs=ends_E) + weights.bias_up_EH[expert_M]
    hidden = F.dropout(ACTIVATIONS[weights.activation].apply(hidden), weights.dropout)
    output_MD = F.grouped_mm(hidden, weights.down_EHD, offs=ends_E) + weights.bias_down_ED[expert_M]
    return (output_MD[row_M].view(*indices_NK.shape, x_ND.shape[1]) * weights_NK[..., None]).sum(1)
