"""Learned router with dropout on its logits: CustomDropGate of arXiv 2303.01610's code, p = 0.5."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.options import require
from smoe_dropout.routers import LinearRouter, Routing
from smoe_dropout.selection import Selection


@dataclass(frozen=True)
class Options:
    """logit_dropout: probability of zeroing a logit in training; the others are divided by 1 - p."""

    logit_dropout: float = 0.5

    def __post_init__(self):
        require(0 <= self.logit_dropout < 1, f"option logit_dropout = {self.logit_dropout} must be from 0 to below 1")


class LogitDropRouter(LinearRouter):
    """h = Dropout(W x + b) in training; the k largest choose, their softmax weighs."""

    Options = Options
    ragged = True

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing."""
        return self.choose(F.dropout(self.logits(x_ND), self.options.logit_dropout, self.training), k)
