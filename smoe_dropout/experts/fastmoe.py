"""Sparse experts by fastmoe's CUDA kernels (github.com/laekov/fastmoe), imported on first use; uses the stacked parameters directly.

Written for fastmoe 1.x: fmoe.functions.{prepare_forward, MOEScatter, MOEGather} and fmoe.linear.MOELinear on one worker.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    if importlib.util.find_spec("fmoe") is None:
        return "fastmoe is not installed (it is not on a package index: build it from github.com/laekov/fastmoe against your CUDA)"
    if device != "cuda":
        return f"fastmoe's kernels need CUDA tensors, but these are on {device!r}"
    if weights.up_EHD.dtype not in (torch.float32, torch.float16, torch.float64):
        return f"fastmoe's kernels do not support {weights.up_EHD.dtype}"
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    from fmoe.functions import MOEGather, MOEScatter, prepare_forward
    from fmoe.linear import MOELinear

    k, num_experts, workers = indices_NK.shape[1], weights.up_EHD.shape[0], 1
    position_M, local, everywhere, counts_E, rows = prepare_forward(indices_NK, num_experts, workers)
    token_M = position_M.div(k, rounding_mode="floor")
    x_MD = MOEScatter.apply(x_ND, token_M, local, everywhere, rows, workers)
    hidden = MOELinear.apply(x_MD, counts_E, weights.up_EHD, weights.bias_up_EH)
    hidden = F.dropout(ACTIVATIONS[weights.activation].apply(hidden), weights.dropout)
    down_EDH = weights.down_EHD.transpose(1, 2).contiguous()  # fastmoe stores [E, out, in]
    output_MD = MOELinear.apply(hidden, counts_E, down_EDH, weights.bias_down_ED)
    output_NKD = MOEGather.apply(output_MD, position_M, local, everywhere, indices_NK.numel(), workers).view(
        *indices_NK.shape, x_ND.shape[1]
    )
    return (output_NKD * weights_NK[..., None]).sum(1)
