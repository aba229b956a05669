"""X-MoE's router: cosine scores in a space of few dimensions (Chi et al. 2022, arXiv 2204.09179, section 3).

s_e = (P x . v_e) / (|P x| |v_e|), P [C, D] with C = E/2, and p = softmax(s / tau) over all experts, or sigmoid(s / tau); the k
largest choose, p weighs (eq. 6 and 7). tau is learned, from tau_0 = 0.3 for softmax and 0.07 for sigmoid. The Switch balance loss,
coefficient 0.01, is of softmax(s / tau_0) for either score (eq. 8). v is drawn orthogonal, times 0.32, as in the authors' torchscale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.precision import without_autocast
from smoe_dropout.routers import LogitRouter, orthogonal, switch_balance_loss

TEMPERATURES = {"softmax": 0.3, "sigmoid": 0.07}


@dataclass(frozen=True)
class Options:
    """score: makes gate weights of the cosines. router_dim: C; 0: E/2, at least 2. temperature: tau_0; 0: that of the paper."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    router_dim: int = 0
    temperature: float = 0.0

    def __post_init__(self):
        require(self.router_dim >= 0, f"option router_dim = {self.router_dim} must be positive, or 0 for E/2")
        require(self.temperature >= 0, f"option temperature = {self.temperature} must be positive, or 0 for that of the paper")


class XMoERouter(LogitRouter):
    """Learned router by cosines. Parameters: `projection` [C, D], `weight` [E, C], `log_temperature`, a scalar."""

    Options = Options
    uses = ("balance_loss",)
    balance_by_default = 0.01

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        o = self.options
        self.gate_weight = "pre_softmax" if o.score == "softmax" else "sigmoid"
        dim = o.router_dim or max(2, config.num_experts // 2)
        self.constant = o.temperature or TEMPERATURES[o.score]
        self.weight = orthogonal(config.num_experts, dim, 0.32)
        self.space = nn.ParameterDict(
            {
                "projection": nn.Parameter(torch.empty(dim, d_model).normal_(0.0, config.init_std)),
                "log_temperature": nn.Parameter(torch.tensor(self.constant).log()),
            }
        )
        self.requires_grad_(not self.freeze)

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> cosines divided by the temperature [..., E]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            low_NC = F.normalize(F.linear(x_ND.to(dtype), self.space["projection"].to(dtype)), dim=-1)
            return F.linear(low_NC, F.normalize(self.weight.to(dtype), dim=-1)) * (-self.space["log_temperature"].to(dtype)).exp()

    def imbalance(self, logits_NE: Tensor, indices_NK: Tensor) -> Tensor:
        """The balance loss without its coefficient."""
        rescaled_NE = logits_NE * (self.space["log_temperature"].to(logits_NE.dtype).exp() / self.constant)
        return switch_balance_loss(rescaled_NE, indices_NK, self.real_N)

    def flops(self, tokens: int) -> int:
        """FLOPs of the projection and the cosines."""
        return 2 * tokens * (self.space["projection"].numel() + self.weight.numel())
