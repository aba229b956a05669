"""Top-p routing: as many experts as it takes to be confident (Huang et al. 2024, arXiv 2403.07652, section 3).

P = softmax(W x); a token has the fewest experts, in descending order of P, whose P add up to p, with weights P. Losses: 0.01 times
E sum_e f_e mean_t P_te, f_e being the fraction of tokens that have expert e, and beta times the mean entropy of P, without which P would
become even and all experts active; beta = 1e-4, p = 0.4. Here k is the most experts that a token has: k = E gives the published router.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, real_mean, switch_balance_loss
from smoe_dropout.selection import GateMass, Selection, TokenK, largest


@dataclass(frozen=True)
class Options:
    """p: share of the probability that a token's experts have, in training and evaluation. entropy_loss: beta."""

    p: float = 0.4
    entropy_loss: float = 1e-4

    def __post_init__(self):
        require(0 < self.p <= 1, f"option p = {self.p} must be above 0 and at most 1")
        require(self.entropy_loss >= 0, f"option entropy_loss = {self.entropy_loss} must not be negative")


class TopPRouter(LinearRouter):
    """Router that gives a token at most k experts. `sd.top_p(model, p)` selects another p."""

    Options = Options
    uses = ("balance_loss",)
    balance_by_default = 0.01
    variable = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        self.gate_weight, self.bias = "pre_softmax", None

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to the experts that reach p, at most k of them, with both losses in training mode."""
        routing = super().choose(logits_NE, k if isinstance(k, GateMass) else GateMass(self.options.p, 1, largest(k)))
        if isinstance(k, TokenK):
            own_NK = torch.arange(largest(k), device=k.values.device) < k.values[:, None]
            routing = routing._replace(indices_NK=routing.indices_NK.masked_fill(~own_NK, -1), weights_NK=routing.weights_NK * own_NK)
        if self.training and self.options.entropy_loss > 0:
            entropy_N = torch.special.entr(logits_NE.softmax(-1)).sum(-1)
            routing.losses["entropy"] = self.options.entropy_loss * real_mean(entropy_N, self.real_N)
        return routing

    def imbalance(self, logits_NE: Tensor, indices_NK: Tensor) -> Tensor:
        """The balance loss without its coefficient."""
        return switch_balance_loss(logits_NE, indices_NK, self.real_N, of_tokens=True)
