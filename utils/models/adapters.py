"""Adapters: experts whose maps are W + B A, of which only A and B, of low rank, are trained (LoRA, Hu et al. 2021, arXiv 2106.09685).

The optimiser then keeps its state for A and B alone, about rank (H + D) / (H D) of that for the maps. The sum is formed once in each
forward pass, so that every backend and every k computes with it, and `merged` makes ordinary experts of it.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smoe_dropout import moe_layers

MAPS = ("up", "down")


class LowRank(nn.Module):
    """W + B A of every expert: W and the result [E, H, D], A [E, R, D] from N(0, 1 / D), B [E, H, R] zero at first."""

    def __init__(self, map_EHD: Tensor, rank: int):
        super().__init__()
        E, H, D = map_EHD.shape
        self.a_ERD = nn.Parameter(torch.empty(E, rank, D).normal_(0.0, D**-0.5))
        self.b_EHR = nn.Parameter(torch.zeros(E, H, rank))

    def forward(self, map_EHD: Tensor) -> Tensor:
        return torch.baddbmm(map_EHD, self.b_EHR, self.a_ERD)


def adapt(model: nn.Module, rank: int) -> None:
    """Freezes the experts, and gives their maps trained adapters."""
    for _, layer in moe_layers(model):
        layer.experts.requires_grad_(False)
        for name in MAPS:
            parametrize.register_parametrization(layer.experts, name, LowRank(getattr(layer.experts, name), rank))


def merged(model: nn.Module) -> nn.Module:
    """The model with ordinary experts: a copy if it has adapters."""
    if not any(parametrize.is_parametrized(layer.experts) for _, layer in moe_layers(model)):
        return model
    made = copy.deepcopy(model)
    for _, layer in moe_layers(made):
        for name in MAPS:
            parametrize.remove_parametrizations(layer.experts, name, leave_parametrized=True)
    return made
