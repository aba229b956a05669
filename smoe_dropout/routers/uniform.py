"""Random experts for every token in every pass: the "per-step random" gate of arXiv 2303.01610's code (CustomRandomGate)."""

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.routers import Router, Routing


class UniformRouter(Router):
    """Router with scores r ~ U(0, 1) for each token and expert; the k largest choose, their softmax weighs. Also random in evaluation."""

    uses = ("gate_weight",)

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)

    def forward(self, x_ND: Tensor, k: int) -> Routing:
        """x [N, D] -> its routing."""
        scores_NE = torch.rand(len(x_ND), self.num_experts, device=x_ND.device)
        top_NK, indices_NK = scores_NE.topk(k, dim=-1)
        return Routing(indices_NK, self.weigh(top_NK), {})
