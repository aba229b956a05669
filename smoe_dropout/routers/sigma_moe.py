"""sigma-MoE's router (Csordas et al. 2023, arXiv 2310.10837, section 4) and its variant of S-BASE.

s = sigmoid(W x), weights of the k largest, not normalised. In training each expert of each token is left out with probability delta, by a
score of 0, and the loss is gamma sum_e p_e log p_e, p = mean of softmax(W x) over the batch: the entropy of the load is maximised.
selection = "sinkhorn": in training the k largest entries of the Sinkhorn-normalised scores choose, which spreads tokens evenly over experts
(S-BASE, Clark et al. 2022, arXiv 2202.01169, as in sigma-MoE's experiments); their weights stay sigmoids. That choice depends on all tokens
of the batch, later ones included; evaluation depends on each token alone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoe_dropout.options import require
from smoe_dropout.routers import over_processes, real_mean, scored


@dataclass(frozen=True)
class Options(scored.Options):
    """Options of the scored router with sigma-MoE's defaults, and two more.

    expert_dropout: delta. selection: what chooses the experts in training. sinkhorn_steps: of normalisation.
    """

    score: Literal["softmax", "sigmoid"] = "sigmoid"
    normalise: bool = False
    bias: bool = False
    expert_dropout: float = 0.05
    selection: Literal["score", "sinkhorn"] = "score"
    sinkhorn_steps: int = 3

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.expert_dropout < 1, f"option expert_dropout = {self.expert_dropout} must be from 0 to below 1")
        require(self.sinkhorn_steps >= 1, f"option sinkhorn_steps = {self.sinkhorn_steps} must be at least 1")


class SigmaMoERouter(scored.ScoredRouter):
    """Scored router with sigmoid gates, expert dropout and an entropy loss, whose coefficient gamma is the balance loss's."""

    Options = Options
    balance_by_default = 0.001

    @property
    def ragged(self) -> bool:
        """Whether it takes a k for each token: not in training by Sinkhorn, which is over tokens of one k."""
        return not (self.training and self.options.selection == "sinkhorn")

    def scores(self, logits_NE: Tensor) -> Tensor:
        """Scores of the experts [N, E], 0 for those that are left out."""
        scores_NE, rate = super().scores(logits_NE), self.options.expert_dropout
        return scores_NE.masked_fill(torch.rand_like(scores_NE) < rate, 0) if self.training and rate else scores_NE

    def ranking(self, scores_NE: Tensor) -> Tensor:
        """Values by which experts are chosen [N, E]."""
        if not (self.training and self.options.selection == "sinkhorn"):
            return super().ranking(scores_NE)
        return sinkhorn(scores_NE.logit(eps=torch.finfo(scores_NE.dtype).tiny), self.options.sinkhorn_steps)

    def losses(self, logits_NE: Tensor, _shares_NE: Tensor, _indices_NK: Tensor) -> dict[str, Tensor]:
        """The entropy loss, whose value and gradient in a distributed run are those of the global batch."""
        p_E = real_mean(logits_NE.softmax(-1), self.real_N)
        tokens = len(logits_NE) if self.real_N is None else self.real_N.sum()
        global_E = over_processes(torch.cat([p_E.detach(), p_E.new_ones(1)]) * tokens)
        global_E = global_E[:-1] / global_E[-1].clamp(min=1)
        # sum p log p, and its gradient, since the gradients of the p outside the logarithm's add up to 0
        return {"entropy": self.balance_loss * (p_E * global_E.clamp(min=torch.finfo(p_E.dtype).tiny).log()).sum()}


def sinkhorn(x_NE: Tensor, steps: int) -> Tensor:
    """Values whose exponentials have nearly equal sums over the tokens, for every expert, and sum 1 over the experts, for every token."""
    for _ in range(steps):
        x_NE = x_NE - x_NE.logsumexp(0)
        x_NE = x_NE - x_NE.logsumexp(1, keepdim=True)
    return x_NE
