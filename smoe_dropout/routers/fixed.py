"""The same experts for every token: CustomRandomGate_Dense of arXiv 2303.01610's code, whose scores are all 1."""

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.routers import Router, Routing, evenly
from smoe_dropout.selection import Selection, largest


class FixedRouter(Router):
    """Experts 0..k-1, each with weight 1/k: at k = E the mean of all. In the official gate torch decides which of equal scores win."""

    uniform = True
    ragged = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing."""
        return evenly(torch.arange(largest(k), device=x_ND.device).expand(len(x_ND), -1), k)
