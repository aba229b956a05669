"""MoE++: experts that compute almost nothing besides the E (Jin et al. 2024, arXiv 2410.07348, section 3).

Besides the E there are C constant experts a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x), a copy expert x and a zero expert 0. Of all
E + C + 2, the k largest of p = softmax(W x) choose and weigh: k is the most of the E that a token has. The balance loss is that of Switch,
with the terms of the C + 2 multiplied by tau = 0.75, which decides how much they are used. C = E/4 - 2, at least 1. The paper's gating
residual, which adds the previous layer's logits, is left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import require
from smoe_dropout.precision import without_autocast
from smoe_dropout.routers import Routing, active, assigned_shares, real_mean
from smoe_dropout.selection import largest


@dataclass(frozen=True)
class Options:
    """constants: C; 0: E/4 - 2, at least 1. tau: share of the balance loss of experts without computation, relative to the others."""

    constants: int = 0
    tau: float = 0.75

    def __post_init__(self):
        require(self.constants >= 0, f"option constants = {self.constants} must be positive, or 0 for E/4 - 2")
        require(self.tau > 0, f"option tau = {self.tau} must be positive")


class Extended(Routing):
    """Routing with the weights of the experts without computation, `special_NZ` [N, C + 2]: constant ones, the copy, zero."""

    special_NZ: Tensor


class MoEPlusPlusLayer(MoELayer):
    """MoE layer with constant, copy and zero experts.

    Parameters: `special` [C + 2, D], their rows of the router; of the constant experts `values` [C, D], v, and `mixes` [C, 2, D], W_c.
    """

    Options = Options
    own_losses = True
    variable = True

    def __init__(self, d_model: int, *arguments):
        super().__init__(d_model, *arguments)
        C, like = self.options.constants or max(self.num_experts // 4 - 2, 1), self.experts.up
        made = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.special = nn.Parameter(torch.empty(C + 2, d_model, **made).normal_(0.0, self.config.init_std), not self.router.freeze)
        self.values = nn.Parameter(torch.randn(C, d_model, **made))
        self.mixes = nn.Parameter(torch.empty(C, 2, d_model, **made).normal_(0.0, self.config.init_std))

    def route(self, x: Tensor) -> Routing:
        """x [..., D] -> the routing of its N tokens, with the weights of experts without computation."""
        x_ND, k, E = x.reshape(-1, x.shape[-1]), self.selection(x), self.num_experts
        logits_NE, real_N = self.router.logits(x_ND), self.router.real_N
        self.router.show(logits_NE)
        with without_autocast(x.device.type):
            logits_NA = torch.cat([logits_NE, F.linear(x_ND.to(logits_NE.dtype), self.special.to(logits_NE.dtype))], 1)
        order_NK = logits_NA.topk(largest(k), dim=-1).indices
        within_NK = active(k, logits_NA, order_NK)
        order_NK = order_NK if within_NK is None else order_NK.masked_fill(~within_NK, -1)
        A, p_NA = logits_NA.shape[1], logits_NA.softmax(-1)
        chosen_NA = torch.zeros(len(x_ND), A + 1, dtype=torch.bool, device=x.device).scatter(1, order_NK % (A + 1), True)[:, :A]
        gates_NA = p_NA * chosen_NA
        weights_NK, indices_NK = gates_NA[:, :E].topk(min(E, order_NK.shape[1]), dim=-1)
        losses = {}
        if self.router.balance_loss > 0 and self.training:
            terms_A = assigned_shares(order_NK, A, p_NA.dtype, real_N) * real_mean(p_NA, real_N)
            losses["balance"] = self.router.balance_loss * A * (terms_A[:E].sum() + self.options.tau * terms_A[E:].sum())
        routing = Extended(indices_NK.masked_fill(weights_NK == 0, -1), weights_NK, losses, True)
        routing.special_NZ = gates_NA[:, E:]
        return routing

    def combine(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the chosen experts' outputs [N, D]."""
        C, special_NZ = len(self.values), self.scaled(routing.special_NZ)
        with without_autocast(x_ND.device.type):
            wide_ND = x_ND.to(special_NZ.dtype)
            mix_NC2 = torch.einsum("nd,cmd->ncm", wide_ND, self.mixes.to(wide_ND.dtype)).softmax(-1) * special_NZ[:, :C, None]
            kept_N1 = special_NZ[:, C, None] + mix_NC2[..., 0].sum(1, keepdim=True)
            simple_ND = kept_N1 * wide_ND + mix_NC2[..., 1] @ self.values.to(wide_ND.dtype)
        y_ND = super().combine(x_ND, routing)
        return y_ND + simple_ND.to(y_ND.dtype)

    def routing_parameters(self) -> list[nn.Parameter]:
        """The router's parameters, and its rows of the experts without computation."""
        return [*super().routing_parameters(), self.special]

    def routing_flops(self, lanes: int, positions: int) -> int:
        """FLOPs of the router and of the experts without computation."""
        return super().routing_flops(lanes, positions) + 2 * lanes * positions * (self.special.numel() + self.mixes.numel())


METHOD = Method(
    name="moe_plus_plus",
    title="MoE++",
    source="arXiv 2410.07348",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=MoEPlusPlusLayer,
    routers=("learned", "random"),
)
