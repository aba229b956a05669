"""THOR: randomly drawn experts, with a consistency loss between two passes per step (Zuo et al. 2021, arXiv 2110.04260).

Training: in each pass every layer draws one expert uniformly for the whole batch. Loss = (CE_1 + CE_2) + alpha * 1/2 (KL(p_1 || p_2) +
KL(p_2 || p_1)), a mean over tokens, with KL summed over the V symbols, as in the paper and its code
(microsoft/Stochastic-Mixture-of-Experts). SMoE-Dropout's code (THOR_Model, new_utils.py) has (CE_1 + CE_2) / 2 + alpha * (KL(p_1 || p_2) +
KL(p_2 || p_1)) / V, where the second term weighs V / 4 times less against the first: option consistency=smoe_dropout. Inference at k
averages k experts drawn per sequence or per token, all of them at k = E; this meaning of k is ours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import Method, Objective
from smoe_dropout.options import require
from smoe_dropout.routers import Routing, evenly
from smoe_dropout.selection import largest
from smoe_dropout.training import synchronized


@dataclass(frozen=True)
class Options:
    """alpha: weight of the consistency loss. consistency: whose form of the loss. inference: draw experts per sentence or per token."""

    alpha: float = 1.0
    inference: Literal["sentence", "token"] = "sentence"
    consistency: Literal["thor", "smoe_dropout"] = "thor"

    def __post_init__(self):
        require(0 <= self.alpha < float("inf"), f"option alpha = {self.alpha} must be a number and not negative")


class ThorLayer(MoELayer):
    """MoE layer that draws k distinct experts, each with weight 1/k, from torch's default generator."""

    Options = Options

    def route(self, x: Tensor) -> Routing:
        """x [..., D] -> random routing of its N tokens: one draw per batch in training, per sequence or token in evaluation."""
        lanes, tokens, k = len(x) if x.dim() > 2 else 1, x.numel() // x.shape[-1], self.selection(x)
        if self.training:
            draws = synchronized(torch.rand(1, self.num_experts, device=x.device))
        else:
            draws = torch.rand(tokens if self.options.inference == "token" else lanes, self.num_experts, device=x.device)
        drawn = draws.topk(largest(k), dim=-1).indices
        indices_NK = drawn.repeat_interleave(tokens // max(len(drawn), 1), 0) if tokens else drawn[:0]
        return evenly(indices_NK, k)


def symmetric_kl(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """1/2 (KL(p || q) + KL(q || p)) for each row [...]."""
    log_p, log_q = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2


def objective(model, forward, settings) -> Objective:
    """Both passes' cross-entropy plus the consistency loss. `nll` is the mean of both passes, the state that of the first."""
    first, second = forward(), forward()
    nll, options = first.token_losses.mean() + second.token_losses.mean(), settings.options
    consistency = options.alpha * symmetric_kl(first.logits, second.logits).mean()
    if options.consistency == "smoe_dropout":
        return Objective(nll / 2 + 2 / first.logits.shape[-1] * consistency, nll / 2, first.state)
    return Objective(nll + consistency, nll / 2, first.state)


def refusal(config: SMoEConfig) -> str | None:
    """Error sentence for fewer than two experts, else None."""
    if config.num_experts < 2:
        return f"num_experts = {config.num_experts}: two passes can only differ with at least 2 experts"
    return None


METHOD = Method(
    name="thor",
    title="THOR",
    source="arXiv 2110.04260",
    sparse=True,
    flags={"moe": True, "gate_name": "none", "freeze_gate": False, "dynamic_moe": False, "moe_top_k": 1},
    objective=objective,
    reads_logits=True,
    options=Options,
    layer=ThorLayer,
    routers=("none",),
    refusal=refusal,
)
