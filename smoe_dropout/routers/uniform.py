"""Random experts for every token in every pass: the "per-step random" gate of arXiv 2303.01610's code (CustomRandomGate)."""

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.routers import Router, Routing, active
from smoe_dropout.selection import Selection, largest


class UniformRouter(Router):
    """Router with scores r ~ U(0, 1) for each token and expert; the k largest choose, their softmax or another `gate_weight` weighs.

    Also random in evaluation.
    """

    uses = ("gate_weight",)
    ragged = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing."""
        scores_NE = torch.rand(len(x_ND), self.num_experts, device=x_ND.device)
        top_NK, indices_NK = scores_NE.topk(largest(k), dim=-1)
        active_NK = active(k, self.shares(scores_NE), indices_NK)
        if active_NK is not None:
            indices_NK = indices_NK.masked_fill(~active_NK, -1)
        return Routing(indices_NK, self.weigh(top_NK, active_NK, scores_NE), {}, active_NK is not None)
