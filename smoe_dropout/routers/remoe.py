"""ReMoE's router: a ReLU in place of top-k and softmax (Wang et al. 2024, arXiv 2412.14711, section 3).

R = ReLU(W x); experts with R_e > 0 are active, R weighs. In training all of these, however many: their mean number is led to k by
the loss lambda mean_t sum_e f_e R_e, where f_e = E / (k T) * number of tokens that have e also balances the load, and after each
pass lambda <- lambda alpha^sign(S_target - S), S being the share of inactive experts and S_target = 1 - k/E. The paper takes S over
all layers, here each layer has its own lambda and reaches k by itself. In evaluation k is the most experts that a token has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing, active, over_processes, real_mean
from smoe_dropout.selection import Selection, TokenK, largest
from smoe_dropout.training import Reports

LARGEST = 1.0  # lambda, which would grow beyond all bounds where k cannot be reached


@dataclass(frozen=True)
class Options:
    """alpha: factor of lambda after a pass with too many or too few experts."""

    alpha: float = 1.2

    def __post_init__(self):
        require(self.alpha > 1, f"option alpha = {self.alpha} must be above 1")


class ReMoERouter(LinearRouter, Reports):
    """Router with as many experts as have a positive logit. Buffer: `penalty`, lambda.

    The coefficient of the balance loss is lambda at first; 0: no loss.
    """

    Options = Options
    uses = ("balance_loss",)
    balance_by_default = 1e-8
    ragged = True
    variable = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        self.bias = None
        self.register_buffer("penalty", torch.tensor(float(self.balance_loss)))
        self.active: Tensor | float = 0.0  # experts per token in the last training pass

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to the experts with positive logits; in training mode also the loss and a step of lambda."""
        self.show(logits_NE)
        gates_NE = logits_NE.relu()
        weights_NK, indices_NK = gates_NE.topk(self.num_experts if self.training else largest(k), dim=-1)
        active_NK = weights_NK > 0
        if not self.training and (within_NK := active(k, gates_NE.log(), indices_NK)) is not None:
            active_NK = active_NK & within_NK
        losses = self.regularised(gates_NE, k) if self.training and self.balance_loss > 0 else {}
        return Routing(indices_NK.masked_fill(~active_NK, -1), weights_NK * active_NK, losses, True)

    def regularised(self, gates_NE: Tensor, k: Selection) -> dict[str, Tensor]:
        """The loss, and a step of lambda."""
        real_N, penalty = self.real_N, self.penalty.clone()
        target = k.values.double().mean().item() if isinstance(k, TokenK) else largest(k)
        with torch.no_grad():
            on_NE = (gates_NE > 0).to(gates_NE.dtype)
            tokens = gates_NE.new_tensor(len(gates_NE)) if real_N is None else real_N.sum().to(gates_NE.dtype)
            counts_E = over_processes(on_NE.sum(0) if real_N is None else (on_NE * real_N[:, None]).sum(0))
            use_E = counts_E / over_processes(tokens).clamp(min=1)
            self.active = use_E.sum()
            self.penalty.mul_(self.options.alpha ** (self.active - target).sign()).clamp_(max=LARGEST)
        loss = penalty * (real_mean(gates_NE, real_N) * use_E * self.num_experts / target).sum()
        return {"sparsity": loss}

    def computed(self, k: int) -> int:
        """Experts computed per token: the rounded mean of the last pass in training, at most k in evaluation."""
        return max(1, round(float(self.active))) if self.training and self.active else k

    def metrics(self) -> dict[str, float]:
        """Mean number of active experts in the last training pass, and lambda."""
        return {"active_experts": float(self.active), "penalty": self.penalty.item()}
