"""Learned router with the router z-loss of ST-MoE (Zoph et al. 2022, arXiv 2202.08906, eq. 5), beside the Switch balance loss."""

from dataclasses import dataclass

from torch import Tensor

from smoe_dropout.options import require
from smoe_dropout.routers import LearnedRouter, Routing, real_mean
from smoe_dropout.selection import Selection


@dataclass(frozen=True)
class Options:
    """z_loss: its coefficient, 0.001 in the paper."""

    z_loss: float = 0.001

    def __post_init__(self):
        require(self.z_loss >= 0, f"option z_loss = {self.z_loss} must not be negative")


class ZLossRouter(LearnedRouter):
    """L_z = mean over tokens of (log sum_e exp h_e(x))^2, which keeps logits small."""

    Options = Options
    ragged = True

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to the k largest logits, with both losses in training mode."""
        routing = super().choose(logits_NE, k)
        if self.training and self.options.z_loss > 0:
            routing.losses["z"] = self.options.z_loss * real_mean(logits_NE.logsumexp(-1).square(), self.real_N)
        return routing
