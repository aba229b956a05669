"""The routers of published mixture-of-experts models, as one family with options.

s = softmax(W x + b) or sigmoid(W x + b); the k largest s + c choose, c being a correction bias that only balances the load, and
w = scale * s, or scale * s / (sum of the chosen s). With groups, only experts of the best groups are chosen (node-limited routing).

- Switch Transformers (arXiv 2101.03961, eq. 2): softmax, not normalised; input jitter; capacity.
- Mixtral (arXiv 2401.04088, section 2.1; its softmax over the k chosen logits is the same as normalised scores), Qwen3-MoE.
- OLMoE (arXiv 2409.02060, section 2), Qwen2-MoE: softmax, not normalised.
- DeepSeek-V2 (arXiv 2405.04434, section 2.2): softmax, a group's score is that of its best expert.
- DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid, correction, scale, normalised, a group's score is the sum of its two best.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, active, switch_balance_loss
from smoe_dropout.selection import Selection, largest


@dataclass(frozen=True)
class Options:
    """Options of the scored router.

    score: of an expert, over its logit. normalise: whether the k chosen scores are divided by their sum. scale: factor of the gate weights.
    groups: number of groups of experts; 1: none. top_groups: groups that may be chosen from; 0: all. group_best: number of best experts
    whose scores are added to a group's score. bias: whether logits have a bias. correction: whether there is a correction bias, a buffer
    that is added to the scores for choosing only. precision: of the logits: at least float32, or the model's own. jitter: in training the
    router's input is multiplied by random numbers from 1 - jitter to 1 + jitter.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 0
    group_best: int = 1
    bias: bool = True
    correction: bool = False
    precision: Literal["float32", "model"] = "float32"
    jitter: float = 0.0

    def __post_init__(self):
        require(self.scale > 0, f"option scale = {self.scale} must be positive")
        require(self.groups >= 1, f"option groups = {self.groups} must be at least 1")
        require(0 <= self.top_groups <= self.groups, f"option top_groups = {self.top_groups} must be from 0 to groups = {self.groups}")
        require(self.group_best >= 1, f"option group_best = {self.group_best} must be at least 1")
        require(0 <= self.jitter < 1, f"option jitter = {self.jitter} must be from 0 to below 1")


class ScoredRouter(LinearRouter):
    """Learned router with a choice of score, normalisation, groups and correction.

    Any k is possible: experts outside the best groups are chosen only when k exceeds the number of those inside.
    Buffers: `correction` [E], and with groups `group` [E], the group of every expert.
    """

    Options = Options
    uses = ("balance_loss",)
    balance_by_default = 0.01
    trains_at_any_k = "the option normalise = False"
    ragged = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        if not self.options.bias:
            self.bias = None
        self.register_buffer("correction", torch.zeros(config.num_experts) if self.options.correction else None)
        grouped = 0 < self.options.top_groups < self.options.groups
        self.register_buffer("group", torch.arange(config.num_experts) * self.options.groups // config.num_experts if grouped else None)

    @property
    def normalised(self) -> bool:
        """Return whether the gate weights of every token sum to 1."""
        return self.options.normalise and self.options.scale == 1

    def learns_from_task(self, k: int) -> bool:
        """Return whether the gate weights depend on the router's parameters: not at k = 1 if they are divided by their sum."""
        return not (k == 1 and self.options.normalise)

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E], in the precision of the option."""
        if self.options.precision == "float32":
            return super().logits(x_ND)
        return F.linear(x_ND, self.weight.to(x_ND.dtype), None if self.bias is None else self.bias.to(x_ND.dtype))

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing, with jitter and the balance loss in training mode."""
        if self.training and self.options.jitter:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.options.jitter, 1 + self.options.jitter)
        logits_NE = self.logits(x_ND)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        self.show(logits_NE)
        scores_NE = self.scores(logits_NE)
        # the softmax of log-sigmoids is the sigmoids divided by their sum, DeepSeek-V3's probabilities (eq. 19)
        shares_NE = F.logsigmoid(logits_NE) if self.options.score == "sigmoid" else logits_NE
        indices_NK = self.ranking(scores_NE.detach()).topk(largest(k), dim=-1).indices
        weights_NK = scores_NE.gather(1, indices_NK)
        active_NK = active(k, shares_NE, indices_NK)
        if active_NK is not None:
            indices_NK, weights_NK = indices_NK.masked_fill(~active_NK, -1), weights_NK * active_NK
        losses = self.losses(logits_NE, shares_NE, indices_NK) if self.balance_loss > 0 and self.training else {}
        return Routing(indices_NK, self.scaled(weights_NK, indices_NK), losses, active_NK is not None)

    def scores(self, logits_NE: Tensor) -> Tensor:
        """Scores of the experts [N, E]."""
        return logits_NE.sigmoid() if self.options.score == "sigmoid" else logits_NE.softmax(-1)

    def scaled(self, weights_NK: Tensor, _indices_NK: Tensor) -> Tensor:
        """Gate weights from the chosen scores."""
        if self.options.normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * self.options.scale

    def losses(self, _logits_NE: Tensor, shares_NE: Tensor, indices_NK: Tensor) -> dict[str, Tensor]:
        """The balance loss, of values whose softmax is the probability and the chosen experts."""
        return {"balance": self.balance_loss * switch_balance_loss(shares_NE, indices_NK, self.real_N)}

    def ranking(self, scores_NE: Tensor) -> Tensor:
        """Values by which experts are chosen [N, E]: corrected scores, those outside the best groups below all inside."""
        if self.correction is not None:
            scores_NE = scores_NE + self.correction
        if self.group is None:
            return scores_NE
        groups_G = torch.arange(self.options.groups, device=scores_NE.device)
        inside_NGE = scores_NE[:, None].masked_fill(self.group != groups_G[:, None], -torch.inf)
        best_NGB = inside_NGE.topk(min(self.options.group_best, self.num_experts), dim=-1).values
        # surgery may leave a group with too few experts, or none
        totals_NG = best_NGB.masked_fill(best_NGB.isinf(), 0).sum(-1).masked_fill(best_NGB[..., 0].isinf(), -torch.inf)
        chosen_NG = torch.zeros_like(totals_NG, dtype=torch.bool).scatter(1, totals_NG.topk(self.options.top_groups).indices, True)
        lowest_N1 = scores_NE.amin(-1, keepdim=True) - scores_NE.amax(-1, keepdim=True) - 1
        return torch.where(chosen_NG[:, self.group], scores_NE, scores_NE + lowest_N1)
