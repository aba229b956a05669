"""Noisy top-k gating with the importance and load losses (Shazeer et al. 2017, arXiv 1701.06538, section 4 and appendix A).

H(x) = W_g x + eps * (softplus(W_noise x) + noise_epsilon), eps ~ N(0, 1) in training; the k largest H choose, their softmax weighs. Losses,
each times the balance coefficient: CV(sum of gate weights)^2, and CV(load)^2 with the smooth load P(x, i) = Phi(((W_g x)_i -
kth_excluding(H, k, i)) / (softplus((W_noise x)_i) + noise_epsilon)), summed over x. The official name NoisyGate sets the epsilon 0.01 and
the initialisation of FastMoE's gate, which has no bias and takes the sample variance in CV, E / (E - 1) times ours.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing
from smoe_dropout.selection import Selection


@dataclass(frozen=True)
class Options:
    """noise_epsilon: smallest deviation of the noise. gate_init: N(0, init_std^2) as in every router, where Shazeer et al. start from zero,
    or "kaiming", FastMoE's: uniform from -1 / sqrt(E) to 1 / sqrt(E), as Kaiming's initialisation sees its maps [D, E].
    """

    noise_epsilon: float = 0.0
    gate_init: Literal["normal", "kaiming"] = "normal"

    def __post_init__(self):
        require(self.noise_epsilon >= 0, f"option noise_epsilon = {self.noise_epsilon} must not be negative")


class NoisyTopKRouter(LinearRouter):
    """Router with trained noise. The paper's balance coefficient is 0.1."""

    Options = Options
    balance_by_default = 0.1

    @property
    def ragged(self) -> bool:
        """Return whether it takes a k for each token: in evaluation, since the load loss is of one k."""
        return not self.training

    uses = ("balance_loss", "gate_weight")

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, d_model).normal_(0.0, config.init_std))
        if self.options.gate_init == "kaiming":
            for weight in (self.weight, self.noise_weight):
                nn.init.uniform_(weight, -1 / math.sqrt(config.num_experts), 1 / math.sqrt(config.num_experts))
        self.requires_grad_(not self.freeze)

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing, with noise and both losses in training mode."""
        clean_NE = self.logits(x_ND)
        if not self.training:
            return self.choose(clean_NE, k)
        self.show(clean_NE)
        with torch.autocast(x_ND.device.type, enabled=False):
            deviation_NE = F.softplus(F.linear(x_ND.to(clean_NE.dtype), self.noise_weight.to(clean_NE.dtype)))
        if self.options.noise_epsilon:
            deviation_NE = deviation_NE + self.options.noise_epsilon
        noisy_NE = clean_NE + torch.randn_like(clean_NE) * deviation_NE
        top_NK, indices_NK = noisy_NE.topk(k, dim=-1)
        weights_NK, losses = self.weigh(top_NK, logits_NE=noisy_NE), {}
        if self.balance_loss > 0:
            importance_NE = torch.zeros_like(clean_NE).scatter(1, indices_NK, weights_NK)
            losses["importance"] = self.balance_loss * squared_variation(summed(importance_NE, self.real_N))
            if k < self.num_experts:  # with k = E every expert is always chosen
                load_NE = smooth_load(clean_NE, noisy_NE, deviation_NE, k)
                losses["load"] = self.balance_loss * squared_variation(summed(load_NE, self.real_N))
        return Routing(indices_NK, weights_NK, losses)

    def flops(self, tokens: int) -> int:
        """FLOPs of the linear map, twice in training for the noise."""
        return super().flops(tokens) * (2 if self.training else 1)


def smooth_load(clean_NE: Tensor, noisy_NE: Tensor, deviation_NE: Tensor, k: int) -> Tensor:
    """Probability that each expert would be chosen for each token if its own noise were drawn again [N, E]."""
    top = noisy_NE.topk(k + 1, dim=-1).values
    # the k-th largest of the others: the (k+1)-th of all for a chosen expert, the k-th otherwise
    threshold_NE = torch.where(noisy_NE > top[:, k, None], top[:, k, None], top[:, k - 1, None])
    return torch.special.ndtr((clean_NE - threshold_NE) / deviation_NE)


def summed(values_NE: Tensor, real_N: Tensor | None) -> Tensor:
    """Sum over the real tokens [E]."""
    return values_NE.sum(0) if real_N is None else (values_NE * real_N[:, None]).sum(0)


def squared_variation(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, variance / mean^2."""
    return values_E.var(correction=0) / (values_E.mean() ** 2 + 1e-10)
