"""MoE++: experts that compute almost nothing besides the E (Jin et al. 2024, arXiv 2410.07348, section 3).

Besides the E there are C constant experts a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x), a copy expert x and a zero expert 0. Of all
E + C + 2, the k largest of p = softmax(G) choose and weigh (eq. 1): k is the most of the E that a token has. G = W x + W_g G', G' being the
logits of the MoE layer before, 0 for the first (eq. 6). The balance loss is 0.01 sum_e eta_e f_e mean_t p_te, f_e being the fraction of
tokens that have e and eta_e = 1 for the E and tau = 0.75 for the C + 2, which decides how much they are used (eq. 7). C = E/4 - 2, at
least 1 (eq. 10). The authors' code, of one model's inference, divides weights by their sum but that of the zero expert: normalise=true.
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
    """Options of MoE++.

    constants: C; 0: E/4 - 2, at least 1. tau: share of the balance loss of experts without computation, relative to the others. residual:
    whether logits depend on those of the layer before. normalise: whether weights but that of the zero expert are divided by their sum.
    """

    constants: int = 0
    tau: float = 0.75
    residual: bool = True
    normalise: bool = False

    def __post_init__(self):
        require(self.constants >= 0, f"option constants = {self.constants} must be positive, or 0 for E/4 - 2")
        require(self.tau > 0, f"option tau = {self.tau} must be positive")


class Extended(Routing):
    """Routing with the weights of the experts without computation, `special_NZ` [N, C + 2]: constant ones, the copy, zero."""

    special_NZ: Tensor


class MoEPlusPlusLayer(MoELayer):
    """MoE layer with constant, copy and zero experts.

    Parameters: `special` [C + 2, D], their rows of the router; of the constant experts `values` [C, D], v, and `mixes` [C, 2, D], W_c;
    `residual` [E + C + 2, E + C + 2], W_g, None in a model's first layer.
    """

    Options = Options
    own_losses = True
    variable = True
    repeatable = False  # its logits depend on those of the layer before, which is not recomputed with it

    def __init__(self, d_model: int, *arguments):
        super().__init__(d_model, *arguments)
        C, like = self.options.constants or max(self.num_experts // 4 - 2, 1), self.experts.up
        made = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.special = nn.Parameter(torch.empty(C + 2, d_model, **made).normal_(0.0, self.config.init_std), not self.router.freeze)
        self.values = nn.Parameter(torch.randn(C, d_model, **made))
        self.mixes = nn.Parameter(torch.empty(C, 2, d_model, **made).normal_(0.0, self.config.init_std))
        every, self.residual = self.num_experts + C + 2, None
        if self.options.residual:
            drawn = torch.empty(every, every, **made).normal_(0.0, self.config.init_std)
            self.residual = nn.Parameter(drawn, not self.router.freeze)

    def place(self, index: int, *arguments) -> None:
        """Set the layer's position in the model; the first layer has no layer before it."""
        super().place(index, *arguments)
        if index == 0:
            self.residual = None

    @property
    def reducible(self) -> bool:
        """Return whether surgery may leave it fewer experts: not where W_g has columns of the experts of the layer before."""
        return self.residual is None

    def route(self, x: Tensor) -> Routing:
        """x [..., D] -> the routing of its N tokens, with the weights of experts without computation."""
        x_ND, k, E = x.reshape(-1, x.shape[-1]), self.selection(x), self.num_experts
        logits_NE, real_N = self.router.logits(x_ND), self.router.real_N
        with without_autocast(x.device.type):
            logits_NA = torch.cat([logits_NE, F.linear(x_ND.to(logits_NE.dtype), self.special.to(logits_NE.dtype))], 1)
            logits_NA = self.with_residual(logits_NA)
        self.router.show(logits_NA[:, :E])
        order_NK = logits_NA.topk(largest(k), dim=-1).indices
        within_NK = active(k, logits_NA, order_NK)
        order_NK = order_NK if within_NK is None else order_NK.masked_fill(~within_NK, -1)
        A, p_NA = logits_NA.shape[1], logits_NA.softmax(-1)
        chosen_NA = torch.zeros(len(x_ND), A + 1, dtype=torch.bool, device=x.device).scatter(1, order_NK % (A + 1), True)[:, :A]
        gates_NA = p_NA * chosen_NA
        if self.options.normalise:
            gates_NA = gates_NA * (torch.arange(A, device=x.device) < A - 1)
            gates_NA = gates_NA / gates_NA.sum(-1, keepdim=True).clamp(min=torch.finfo(gates_NA.dtype).tiny)
        weights_NK, indices_NK = gates_NA[:, :E].topk(min(E, order_NK.shape[1]), dim=-1)
        losses = {}
        if self.router.balance_loss > 0 and self.training:
            terms_A = assigned_shares(order_NK, A, p_NA.dtype, real_N, of_tokens=True) * real_mean(p_NA, real_N)
            losses["balance"] = self.router.balance_loss * (terms_A[:E].sum() + self.options.tau * terms_A[E:].sum())
        routing = Extended(indices_NK.masked_fill(weights_NK == 0, -1), weights_NK, losses, True)
        routing.special_NZ = gates_NA[:, E:]
        return routing

    def with_residual(self, logits_NA: Tensor) -> Tensor:
        """The logits plus W_g G', where the layer before had as many tokens and experts; also passes them on."""
        if not self.options.residual:
            return logits_NA
        if self.residual is not None:
            before_NA = None if self.index == 0 else self.shared.carried
            if before_NA is None or before_NA.shape != logits_NA.shape:
                before_NA = torch.zeros_like(logits_NA)
            logits_NA = logits_NA + F.linear(before_NA, self.residual.to(logits_NA.dtype))
        self.shared.carried = logits_NA if self.index < self.count - 1 else None  # not kept beyond the pass
        return logits_NA

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
        return [*super().routing_parameters(), self.special, *([] if self.residual is None else [self.residual])]

    def routing_flops(self, lanes: int, positions: int) -> int:
        """FLOPs of the router and of the experts without computation."""
        maps = [self.special, self.mixes, *([] if self.residual is None else [self.residual])]
        return super().routing_flops(lanes, positions) + 2 * lanes * positions * sum(each.numel() for each in maps)


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
