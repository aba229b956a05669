"""StableMoE: routing that is learned in a first stage and never changes afterwards (Dai et al. 2022, arXiv 2204.08396, section 3).

Stage one, the first `stage_one` of training: s = W x chooses, and the token's own scores d_e = v_e . w(id), of a word embedding w, learn to
choose the same, by 0.3 times the mean cross-entropy of softmax(d) to the chosen experts, the factor of the authors' command (eq. 11 has
none). The balance loss, coefficient 0.3, is mean_t sum_{e chosen by t} (n_e - n) / n sigmoid(s_te), n_e being the tokens of expert e, n
their mean. W and v are drawn orthogonal, times 0.1, w from N(0, 1).
Stage two: d, which is frozen, chooses, so that a token id has the same experts for ever. In both stages sigmoid(s) weighs, and in
evaluation d chooses. The paper has k = 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, active, assigned_shares, orthogonal, real_mean
from smoe_dropout.routers.hash import ids_of_tokens
from smoe_dropout.selection import Selection, largest
from smoe_dropout.training import FollowsTraining


@dataclass(frozen=True)
class Options:
    """Options of StableMoE.

    stage_one: fraction of training in which the routing is learned. router_vocabulary: number of token ids that have an embedding; larger
    ids share those of their remainder. router_dim: width of the embedding. distillation_loss: weight of the cross-entropy.
    """

    stage_one: float = 0.1
    router_vocabulary: int = 256
    router_dim: int = 50
    distillation_loss: float = 0.3

    def __post_init__(self):
        require(0 <= self.stage_one <= 1, f"option stage_one = {self.stage_one} must be from 0 to 1")
        for name in ("router_vocabulary", "router_dim"):
            require(getattr(self, name) >= 1, f"option {name} = {getattr(self, name)} must be at least 1")
        require(self.distillation_loss >= 0, f"option distillation_loss = {self.distillation_loss} must not be negative")


class StableMoERouter(LinearRouter, FollowsTraining):
    """Router in two stages. Parameters: `weight`, `centroids` [E, C] and the embedding [V, C]; buffer `table` [E, V], the scores d that
    choose, kept as they were at the last step of stage one.
    """

    Options = Options
    needs = frozenset({"tokens"})
    uses = ("balance_loss",)
    balance_by_default = 0.3
    ragged = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        o, self.gate_weight, self.bias = self.options, "sigmoid", None
        self.weight = orthogonal(config.num_experts, d_model, 0.1)
        self.centroids = orthogonal(config.num_experts, o.router_dim, 0.1)
        self.words = nn.ParameterList([torch.randn(o.router_vocabulary, o.router_dim)])
        self.register_buffer("table", self.scores_of_ids().detach())
        self.requires_grad_(not self.freeze)

    def scores_of_ids(self) -> Tensor:
        """d of every token id [E, V]."""
        return self.centroids @ self.words[0].t()

    @property
    def learning(self) -> bool:
        """Return whether this is stage one."""
        return self.training and not self.freeze and self.progress < self.options.stage_one

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing; in training mode with both losses. RuntimeError without token ids."""
        logits_NE, ids_N = self.logits(x_ND), ids_of_tokens(self, x_ND) % self.options.router_vocabulary
        self.show(logits_NE)
        scores_EV = self.scores_of_ids()
        if self.learning:
            with torch.no_grad():
                self.table.copy_(scores_EV)
        chooser_NE = logits_NE if self.learning else self.table.t()[ids_N].to(logits_NE.dtype)
        indices_NK = chooser_NE.detach().topk(largest(k), dim=-1).indices
        active_NK = active(k, chooser_NE, indices_NK)
        if active_NK is None:
            active_NK = torch.ones_like(indices_NK, dtype=torch.bool)
        weights_NK = logits_NE.gather(1, indices_NK).sigmoid() * active_NK
        routing = Routing(indices_NK.masked_fill(~active_NK, -1), weights_NK, {}, not isinstance(k, int))
        if self.training:
            share_E = assigned_shares(routing.indices_NK, self.num_experts, logits_NE.dtype, self.real_N)
            excess_NK = (self.num_experts * share_E - 1)[indices_NK]
            balance = real_mean((excess_NK * weights_NK).sum(-1), self.real_N)
            log_NK = F.log_softmax(scores_EV.t()[ids_N].to(logits_NE.dtype), -1).gather(1, indices_NK) * active_NK
            distillation = -real_mean(log_NK.sum(-1) / active_NK.sum(-1), self.real_N)
            stage = float(self.learning)  # in stage two both have a gradient of 0 rather than none, as data parallelism needs
            routing.losses["balance"] = stage * self.balance_loss * balance
            routing.losses["distillation"] = stage * self.options.distillation_loss * distillation
        return routing
