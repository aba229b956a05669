"""DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2), with the loss-free balance of Wang et al. 2024 (arXiv 2408.15664).

s = sigmoid(W x); the k largest s + c choose, w = s / (sum of the chosen s). After each training pass
c_i <- c_i + u sign(mean load - load_i) (algorithm 1), so that c alone balances the load; it never weighs. The first `shared` experts are
chosen for every token with weight 1 (DeepSeekMoE, arXiv 2401.06066, section 3.2) and count in k: k - shared are routed. The balance loss,
coefficient 1e-4 as in DeepSeek-V3, is taken over the batch rather than over each sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import Routing, assigned_shares, scored, switch_balance_loss
from smoe_dropout.selection import Selection


@dataclass(frozen=True)
class Options(scored.Options):
    """Options of the scored router with DeepSeek-V3's defaults, and two more.

    shared: number of experts that every token has, below E. correction_rate: u, the step of the correction after a training pass.
    """

    score: Literal["softmax", "sigmoid"] = "sigmoid"
    bias: bool = False
    correction: bool = True
    shared: int = 1
    correction_rate: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        require(self.shared >= 0, f"option shared = {self.shared} must not be negative")
        require(self.correction_rate >= 0, f"option correction_rate = {self.correction_rate} must not be negative")
        require(self.correction or not self.correction_rate, "option correction = False needs correction_rate = 0: nothing is corrected")


class DeepSeekRouter(scored.ScoredRouter):
    """Scored router with shared experts and a correction bias that follows the load."""

    Options = Options
    balance_by_default = 1e-4
    ragged = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        shared = self.options.shared
        require(shared < config.num_experts, f"option shared = {shared} must be below num_experts = {config.num_experts}")

    def keep(self, experts: Sequence[int], members: int) -> None:
        """Reduce the router to these experts. ConfigError unless the shared experts are the first of them."""
        shared = list(range(self.options.shared))
        require(
            list(experts[: len(shared)]) == shared, f"the router's shared experts {shared} must stay the first of those kept: {[*experts]}"
        )
        super().keep(experts, members)

    def learns_from_task(self, k: int) -> bool:
        """Return whether the gate weights depend on the router's parameters: not with one routed expert if weights sum to 1."""
        return k > self.options.shared + self.options.normalise

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing; in training mode also a step of the correction."""
        routing = super().forward(x_ND, k)
        if self.training and self.options.correction_rate:
            self.correct(routing.indices_NK)
        return routing

    @torch.no_grad()
    def correct(self, indices_NK: Tensor) -> None:
        """Raise the correction of routed experts with less than the mean load, and lower that of the others."""
        load_R = assigned_shares(self.routed(indices_NK), self.num_experts - self.options.shared, self.correction.dtype, self.real_N)
        self.correction[self.options.shared :] += self.options.correction_rate * (load_R.mean() - load_R).sign()

    def routed(self, indices_NK: Tensor) -> Tensor:
        """Indices among the routed experts; -1 for the shared ones."""
        return (indices_NK - self.options.shared).clamp(min=-1)

    def ranking(self, scores_NE: Tensor) -> Tensor:
        """Values by which experts are chosen [N, E]: those of the shared experts are the largest."""
        values_NE, shared = super().ranking(scores_NE), self.options.shared
        first_S = torch.arange(shared, 0, -1, device=values_NE.device)
        return torch.cat([values_NE.amax(-1, keepdim=True) + first_S, values_NE[:, shared:]], 1)

    def scaled(self, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """Gate weights: 1 for the shared experts, those of the scored router for the others."""
        shared_NK = (indices_NK >= 0) & (indices_NK < self.options.shared)
        return super().scaled(weights_NK.masked_fill(shared_NK, 0), indices_NK).masked_fill(shared_NK, 1)

    def losses(self, _logits_NE: Tensor, shares_NE: Tensor, indices_NK: Tensor) -> dict[str, Tensor]:
        """The balance loss over the routed experts."""
        shares_NR = shares_NE[:, self.options.shared :]
        return {"balance": self.balance_loss * switch_balance_loss(shares_NR, self.routed(indices_NK), self.real_N)}
