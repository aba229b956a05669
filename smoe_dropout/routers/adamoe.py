"""AdaMoE: null experts, which compute nothing, let tokens have different numbers of experts (Zeng et al. 2024, arXiv 2406.13233).

Of E experts and M null experts with logits W x a token takes the k' = k (E + M) / E largest, and those among them that are no null experts
compute, weighed by a softmax over them (section 3.2). The Switch balance loss over all E + M, in which every null expert counts with the
mean load of the null experts (section 3.3), leads to k experts per token on average, 0 to k'. At k = E all experts are active.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, assigned_shares, real_mean
from smoe_dropout.selection import GateMass, Selection, TokenK, largest


@dataclass(frozen=True)
class Options:
    """null_experts: M as a multiple of E."""

    null_experts: int = 1

    def __post_init__(self):
        require(self.null_experts >= 1, f"option null_experts = {self.null_experts} must be at least 1, times the number of experts")


class AdaMoERouter(LinearRouter):
    """Learned router with null experts. weight [(1 + M/E) E, D], those of the null experts last; no bias."""

    Options = Options
    uses = ("balance_loss",)
    balance_by_default = 0.01
    variable = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        rows = config.num_experts * (1 + self.options.null_experts)
        self.weight, self.bias = nn.Parameter(torch.empty(rows, d_model).normal_(0.0, config.init_std)), None
        self.requires_grad_(not self.freeze)

    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Stay random: nothing tells what null experts are good for."""

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to the experts among the k' largest logits, with the balance loss in training mode; a gate mass has no null experts."""
        E, slots = self.num_experts, 1 + self.options.null_experts
        if isinstance(k, GateMass):
            return super().choose(logits_NE[:, :E], k)
        self.show(logits_NE[:, :E])
        order_NK = logits_NE.topk(largest(k) * slots, dim=-1).indices
        if isinstance(k, TokenK):
            within_NK = torch.arange(order_NK.shape[1], device=order_NK.device) < (k.values * slots)[:, None]
        else:
            within_NK = torch.ones_like(order_NK, dtype=torch.bool)
        chosen_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, order_NK, within_NK)[:, :E]
        lowest = torch.finfo(logits_NE.dtype).min  # finite, so that the softmax is, too, where a token has no expert
        top_NK, indices_NK = logits_NE[:, :E].masked_fill(~chosen_NE, lowest).topk(min(E, order_NK.shape[1]), dim=-1)
        active_NK = top_NK > lowest
        losses = {}
        if self.balance_loss > 0 and self.training:
            share_R = assigned_shares(order_NK.masked_fill(~within_NK, -1), E * slots, logits_NE.dtype, self.real_N)
            share_R = torch.cat([share_R[:E], share_R[E:].mean().expand(E * slots - E)])
            losses["balance"] = self.balance_loss * E * slots * (share_R * real_mean(logits_NE.softmax(-1), self.real_N)).sum()
        return Routing(indices_NK.masked_fill(~active_NK, -1), top_NK.softmax(-1) * active_NK, losses, True)
