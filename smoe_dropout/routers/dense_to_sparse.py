"""Dense-to-sparse gate (Nie et al. 2021, arXiv 2112.14397), as CustomDTSGate of arXiv 2303.01610's code.

Training: p = softmax((W x + b + G) / temperature), with Gumbel noise G and a temperature that falls linearly from 2 to 0.3. The number of
active experts is the mean number of p above the threshold, at least k; the unnormalised p are the gate weights. Evaluation: top-k softmax.

CustomDTSGate_softmax is the option normalise = False, CustomDTSRandomGate is assign = "random", and CustomDTSRandomGate_softmax is both. By
these names the temperature is 1 throughout: the official training sets that of CustomDTSGate alone (train.py:506).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, switch_balance_loss
from smoe_dropout.selection import Selection
from smoe_dropout.training import FollowsTraining, Reports


@dataclass(frozen=True)
class Options:
    """Options of the dense-to-sparse gate.

    max_temp, min_temp: temperature at the start and end of training. threshold: experts with p above it are active. assign: "random" draws
    r ~ U(0, 1) for each token and expert in place of W x + b, also in evaluation. normalise: whether the gate weights in evaluation are the
    softmax of the k chosen logits, or that of all, as in training.
    """

    max_temp: float = 2.0
    min_temp: float = 0.3
    threshold: float = 0.001
    assign: Literal["learned", "random"] = "learned"
    normalise: bool = True

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

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        self.gate_weight = "softmax" if self.options.normalise else "pre_softmax"
        if self.options.assign == "random":
            self.weight = self.bias = None

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E], random ones if so assigned."""
        if self.options.assign == "learned":
            return super().logits(x_ND)
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        return torch.rand(*x_ND.shape[:-1], self.num_experts, device=x_ND.device, dtype=dtype)

    def flops(self, tokens: int) -> int:
        """FLOPs of the linear map, if there is one."""
        return super().flops(tokens) if self.options.assign == "learned" else 0

    @property
    def ragged(self) -> bool:
        """Return whether it takes a k for each token: in evaluation, since in training all tokens have the same number of experts."""
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
