"""Dense-to-sparse gate (Nie et al. 2021, arXiv 2112.14397), as CustomDTSGate of arXiv 2303.01610's code.

Training: p = softmax((W x + b + G) / temperature), with Gumbel noise G and a temperature that falls linearly from 2 to 0.3. The number of
active experts is the mean number of p above the threshold, at least k; the unnormalised p are the gate weights. Evaluation: top-k softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, switch_balance_loss
from smoe_dropout.selection import Selection
from smoe_dropout.training import FollowsTraining, Reports


@dataclass(frozen=True)
class Options:
    """max_temp, min_temp: temperature at the start and end of training. threshold: experts with p above it are active."""

    max_temp: float = 2.0
    min_temp: float = 0.3
    threshold: float = 0.001

    def __post_init__(self):
        require(
            0 < self.min_temp <= self.max_temp,
            f"options min_temp = {self.min_temp} and max_temp = {self.max_temp} must satisfy 0 < min_temp <= max_temp",
        )
        require(0 <= self.threshold < 1, f"option threshold = {self.threshold} must be from 0 to below 1")


class DenseToSparseRouter(LinearRouter, FollowsTraining, Reports):
    """Router with many active experts early in training and few at the end."""

    Options = Options
    uses = ("balance_loss",)
    active = 0

    @property
    def ragged(self) -> bool:
        """Whether it takes a k for each token: in evaluation, since in training all tokens have the same number of experts."""
        return not self.training

    @property
    def temperature(self) -> float:
        """Softmax temperature at the current training step."""
        return self.options.max_temp + (self.options.min_temp - self.options.max_temp) * self.progress

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing, to more than k experts in training where p exceeds the threshold."""
        logits_NE = self.logits(x_ND)
        if not self.training:
            return self.choose(logits_NE, k)
        self.show(logits_NE)
        gumbel_NE = -torch.empty_like(logits_NE).exponential_().log()
        p_NE = ((logits_NE + gumbel_NE) / self.temperature).softmax(-1)
        above = int((p_NE > self.options.threshold).sum(-1, dtype=torch.float32).mean()) if len(x_ND) else 0
        self.active = max(k, above)
        weights_NK, indices_NK = p_NE.topk(self.active, dim=-1)
        losses = {}
        if self.balance_loss > 0:
            losses["balance"] = self.balance_loss * switch_balance_loss(logits_NE, indices_NK, self.real_N)
        return Routing(indices_NK, weights_NK, losses)

    def computed(self, k: int) -> int:
        """Experts computed per token: those of the last pass in training, else k."""
        return max(k, self.active) if self.training else k

    def metrics(self) -> dict[str, float]:
        """Current temperature and number of active experts."""
        return {"temperature": self.temperature, "active_experts": self.active}
