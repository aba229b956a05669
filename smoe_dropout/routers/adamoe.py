"""AdaMoE: null experts, which compute nothing, vary the number of experts of a token (Zeng et al. 2024, arXiv 2406.13233, section 3).

Of E experts and M null experts with logits W x a token takes the k' = k (E + M) / E largest, rounded, and those among them that are no
null experts compute, weighed by a softmax over them. The balance loss (E + M) sum_e f_e mean_t softmax(W x_t)_e, f_e being the fraction of
tokens that have e and the mean of these for every null expert (eq. 6), leads to k experts per token on average, 0 to k'. Its coefficient
is 0.02 in the first half of training and 0.0001 in the second, as in the first and second epoch of the paper's fine-tuning of Mixtral with
M = E (sections 3.4 and 4.2). At k = E all are active.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.options import require
from smoe_dropout.precision import without_autocast
from smoe_dropout.routers import LinearRouter, Routing, assigned_shares, real_mean
from smoe_dropout.selection import GateMass, Selection, TokenK, largest
from smoe_dropout.training import FollowsTraining


@dataclass(frozen=True)
class Options:
    """null_experts: M as a multiple of E at first; M stays when surgery removes experts.

    loosened: factor of the balance loss in the second half of training.
    """

    null_experts: int = 1
    loosened: float = 0.005

    def __post_init__(self):
        require(self.null_experts >= 1, f"option null_experts = {self.null_experts} must be at least 1, times the number of experts")
        require(self.loosened >= 0, f"option loosened = {self.loosened} must not be negative")


class AdaMoERouter(LinearRouter, FollowsTraining):
    """Learned router with null experts. Parameters: `weight` [E, D], and `nulls`, those of the null experts [M, D]; no bias."""

    Options = Options
    uses = ("balance_loss",)
    balance_by_default = 0.02
    ragged = True
    variable = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        nulls = self.options.null_experts * config.num_experts
        self.bias, self.nulls = None, nn.ParameterList([torch.empty(nulls, d_model).normal_(0.0, config.init_std)])
        self.requires_grad_(not self.freeze)

    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Stay random: nothing tells what null experts are good for."""

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing, with the balance loss in training mode. A gate mass has no null experts."""
        logits_NE, E = self.logits(x_ND), self.num_experts
        if isinstance(k, GateMass):
            return self.choose(logits_NE, k)
        self.show(logits_NE)
        with without_autocast(x_ND.device.type):
            every_NA = torch.cat([logits_NE, F.linear(x_ND.to(logits_NE.dtype), self.nulls[0].to(logits_NE.dtype))], 1)
        slots, A = every_NA.shape[1] / E, every_NA.shape[1]
        order_NK = every_NA.topk(round(largest(k) * slots), dim=-1).indices
        within_NK = torch.ones_like(order_NK, dtype=torch.bool)
        if isinstance(k, TokenK):
            within_NK = torch.arange(order_NK.shape[1], device=order_NK.device) < (k.values * slots).round()[:, None]
        chosen_NE = torch.zeros_like(every_NA, dtype=torch.bool).scatter(1, order_NK, within_NK)[:, :E]
        lowest = torch.finfo(logits_NE.dtype).min  # finite, so that the softmax is, too, where a token has no expert
        top_NK, indices_NK = logits_NE.masked_fill(~chosen_NE, lowest).topk(min(E, order_NK.shape[1]), dim=-1)
        active_NK = top_NK > lowest
        losses = {}
        if self.balance_loss > 0 and self.training:
            share_A = assigned_shares(order_NK.masked_fill(~within_NK, -1), A, every_NA.dtype, self.real_N, of_tokens=True)
            share_A = torch.cat([share_A[:E], share_A[E:].mean().expand(A - E)])
            factor = self.balance_loss * (self.options.loosened if self.progress >= 0.5 else 1.0)
            losses["balance"] = factor * A * (share_A * real_mean(every_NA.softmax(-1), self.real_N)).sum()
        return Routing(indices_NK.masked_fill(~active_NK, -1), top_NK.softmax(-1) * active_NK, losses, True)

    def flops(self, tokens: int) -> int:
        """FLOPs of both linear maps."""
        return super().flops(tokens) + 2 * tokens * self.nulls[0].numel()
