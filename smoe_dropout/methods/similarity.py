"""Similarity-aware routing: a token's router scores are averaged over similar tokens (Nguyen et al. 2025, arXiv 2505.00792).

e_j = W u_j + b, the router's scores of MoE input u_j; e'_i = sum_j softmax_j(u_i^T W_s u_j / tau) e_j; then top-k of e'. With causal
attention j runs over the positions up to i of the same segment, since a language model's routes may not depend on later tokens; otherwise
over all positions, including padding. Positions in a cache of transformers count as the same segment; the memory of a Transformer-XL does
not, but a segment may be read in several calls. tau = sqrt(d) and the initial W_s = identity are our choice: the paper does not state them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.hosts.attention import is_causal, with_past
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import require
from smoe_dropout.routers import Routing


@dataclass(frozen=True)
class Options:
    """tau: temperature; 0 for the square root of d_model."""

    tau: float = 0.0

    def __post_init__(self):
        require(self.tau >= 0, f"option tau = {self.tau} must be positive, or 0 for the square root of d_model")


class SimilarityLayer(MoELayer):
    """MoE layer for inputs [B, T, D] in models with attention. `similarity` is W_s."""

    Options = Options
    needs = frozenset({"attention"})

    def __init__(self, d_model: int, *arguments):
        super().__init__(d_model, *arguments)
        up = self.experts.up
        self.similarity = nn.Parameter(torch.eye(d_model, device=up.device, dtype=torch.promote_types(up.dtype, torch.float32)))
        self.similarity.requires_grad_(not self.router.freeze)
        self.tau = self.options.tau or math.sqrt(d_model)

    def route(self, x: Tensor) -> Routing:
        """x [B, T, D] -> the routing of its B * T tokens."""
        logits_BTE = self.router.logits(x)
        with torch.autocast(x.device.type, enabled=False):
            u_BTD = x.to(logits_BTE.dtype)
            u_BSD, logits_BSE = with_past(self, u_BTD, logits_BTE)
            scores_BTS = (u_BTD @ self.similarity.to(u_BTD.dtype)) @ u_BSD.transpose(1, 2) / self.tau
            if is_causal(self.attention):
                T, S = scores_BTS.shape[1:]
                future_TS = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(1 + S - T)
                scores_BTS = scores_BTS.masked_fill(future_TS, -math.inf)
            mixed_BTE = scores_BTS.softmax(-1) @ logits_BSE
        return self.router.choose(mixed_BTE.flatten(0, 1), self.selection(x))

    def routing_parameters(self) -> list[nn.Parameter]:
        """The router's parameters and W_s."""
        return [*super().routing_parameters(), self.similarity]

    def routing_flops(self, lanes: int, positions: int) -> int:
        """FLOPs of the router, the similarities and the averaging."""
        d_model, tokens = self.similarity.shape[0], lanes * positions
        return super().routing_flops(lanes, positions) + 2 * tokens * (d_model**2 + positions * (d_model + self.num_experts))


METHOD = Method(
    name="similarity",
    title="Similarity-aware SMoE",
    source="arXiv 2505.00792",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=SimilarityLayer,
    routers=("learned", "random"),
)
