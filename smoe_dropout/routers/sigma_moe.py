"""sigma-MoE's router (Csordas et al. 2023, arXiv 2310.10837, section 4) and its variant of S-BASE.

s = sigmoid(W x), weights of the k largest, not normalised. In training each expert of each token is left out with probability delta, by a
score of 0, and the loss is gamma sum_e p_e log p_e, p = mean of softmax(W x) over the batch: the entropy of the load is maximised. Rows of
W have norm 1 at first. delta = 0.05 and gamma = 1e-4 are those of the authors' runs on enwik8 (RobertCsordas/moe, 6b175aa).
selection = "sinkhorn": in training the k largest entries of the Sinkhorn-normalised scores choose, which spreads tokens evenly over experts
(S-BASE, Clark et al. 2022, arXiv 2202.01169, as in sigma-MoE's experiments); their weights stay sigmoids. That choice depends on all tokens
of the batch, later ones included; evaluation depends on each token alone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.config import SMoEConfig
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
    balance_by_default = 1e-4

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))

    @property
    def ragged(self) -> bool:
        """Return whether it takes a k for each token: not in training by Sinkhorn, which is over tokens of one k."""
        return not self.spreads

    @property
    def spreads(self) -> bool:
        """Return whether Sinkhorn-normalised scores choose."""
        return self.training and self.options.selection == "sinkhorn"

    def scores(self, logits_NE: Tensor) -> Tensor:
        """Scores of the experts [N, E]; 0 for those that are left out, unless Sinkhorn-normalised scores choose."""
        scores_NE = super().scores(logits_NE)
        return scores_NE if self.spreads else self.without_some(scores_NE, 0.0)

    def ranking(self, scores_NE: Tensor) -> Tensor:
        """Values by which experts are chosen [N, E]."""
        if not self.spreads:
            return super().ranking(scores_NE)
        even_NE = sinkhorn(scores_NE.logit(eps=torch.finfo(scores_NE.dtype).tiny), self.options.sinkhorn_steps)
        return self.without_some(even_NE, -torch.inf)

    def without_some(self, values_NE: Tensor, none: float) -> Tensor:
        """The values in evaluation; in training mode with `none` in place of those that expert dropout draws."""
        rate = self.options.expert_dropout
        return values_NE.masked_fill(torch.rand_like(values_NE) < rate, none) if self.training and rate else values_NE

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
