"""Routing by one neuron of each expert (CMoE, arXiv 2502.04416, section 3.2, "analytical router")."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.options import require
from smoe_dropout.precision import without_autocast
from smoe_dropout.registry import unknown
from smoe_dropout.routers import LogitRouter
from smoe_dropout.single_position import product


@dataclass(frozen=True)
class Options:
    """activation: of the experts, a name in `ACTIVATIONS`; `convert` sets it."""

    activation: str = "silu_gated"

    def __post_init__(self):
        require(self.activation in ACTIVATIONS, unknown("option activation", self.activation, ACTIVATIONS))


class RepresentativeRouter(LogitRouter):
    """h_e(x) = |activation of a neuron of expert e|. Parameters: weight [E, D], bias [E], twice as many rows if gated, the gates' first."""

    Options = Options
    frozen_by_default = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        rows = config.num_experts * ACTIVATIONS[self.options.activation].width
        self.weight = nn.Parameter(torch.empty(rows, d_model).normal_(0.0, config.init_std))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.requires_grad_(not self.freeze)

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            return ACTIVATIONS[self.options.activation].apply(product(x_ND.to(dtype), self.weight.to(dtype), self.bias.to(dtype))).abs()

    @torch.no_grad()
    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Take from each expert the neuron whose activations are nearest to the mean of the expert's. Ignores the strengths."""
        H = experts.down.shape[1]
        for e, (up, bias) in enumerate(zip(experts.up.float(), experts.bias_up.float(), strict=True)):
            hidden_TH = ACTIVATIONS[self.options.activation].apply(torch.addmm(bias, inputs_TD, up.t()))
            nearest = (hidden_TH - hidden_TH.mean(1, keepdim=True)).square().sum(0).argmin()
            self.weight[e :: self.num_experts] = up[nearest::H]
            self.bias[e :: self.num_experts] = bias[nearest::H]

    def flops(self, tokens: int) -> int:
        """FLOPs of the linear map."""
        return 2 * tokens * self.weight.numel()
