"""A trained model at one number of active experts, for inference alone."""

import copy

import torch
from torch import nn

from smoe_dropout.control import moe_layers, set_top_k


def slim(model: nn.Module, k: int, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy with k active experts in every MoE layer, in evaluation mode and without gradients; the model stays as it is.

    The paper's self-slimmable inference: time and active parameters fall with k; all experts stay, unless `operate` takes some away before.
    `dtype`: of all weights but the routers', which stay as they are, since a rounded router may choose others. ValueError for a k that some
    layer has not, or a model without experts.
    """
    slimmed = copy.deepcopy(model).eval().requires_grad_(False)
    set_top_k(slimmed, k)
    if dtype is not None:
        routers = [(layer, copy.deepcopy(layer.router)) for _, layer in moe_layers(slimmed)]
        slimmed.to(dtype)
        for layer, router in routers:
            layer.router = router
    return slimmed
