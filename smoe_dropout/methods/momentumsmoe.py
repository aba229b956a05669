"""MomentumSMoE: layers of a model as steps of gradient descent with momentum (Teo and Nguyen 2024, arXiv 2410.14574).

Heavy ball across depth, with m = 0 before the first MoE layer of every forward pass: m <- mu m + gamma f(x), x <- x + m, then the model's
LayerNorm; f is the layer's weighted sum of experts with the sign absorbed. AdamSMoE: in the first layer the step is p / sqrt(v + 1e-8)
with p = (1 - beta1) f and v = (1 - beta2) f^2 (averages that start from 0, without bias correction), while m is unchanged. Here f is taken
before the model's dropout, in the official code after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import require
from smoe_dropout.routers import Routing


@dataclass(frozen=True)
class Options:
    """Options of MomentumSMoE and AdamSMoE.

    mu: momentum, 0.7 as in the authors' scripts (their code's default is 0.9). gamma: step size of m.
    adam: use an Adam step in the first layer, with beta1, beta2 and step size adam_gamma.
    """

    mu: float = 0.7
    gamma: float = 1.0
    adam: bool = False
    adam_gamma: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self):
        for name in ("mu", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"option {name} = {getattr(self, name)} must be from 0 to below 1")


class MomentumLayer(MoELayer):
    """MoE layer whose output is the step that the model's residual adds; the momentum is passed from layer to layer within a pass."""

    Options = Options
    repeatable = False  # its momentum comes from earlier layers, which are not recomputed with it

    def combine(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The step [N, D]; also updates the momentum."""
        f_ND = super().combine(x_ND, routing)
        before = None if self.index == 0 else self.shared.carried
        o = self.options
        m_ND = o.gamma * f_ND if before is None else o.mu * before + o.gamma * f_ND
        self.shared.carried = m_ND if self.index < self.count - 1 else None  # not kept beyond the pass
        if o.adam and self.index == 0:
            f_ND = f_ND.to(torch.promote_types(f_ND.dtype, torch.float32))
            p, v = (1 - o.beta1) * f_ND, (1 - o.beta2) * f_ND**2
            return (o.adam_gamma * p / torch.sqrt(v + 1e-8)).to(m_ND.dtype)
        return m_ND


METHOD = Method(
    name="momentumsmoe",
    title="MomentumSMoE",
    source="arXiv 2410.14574",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=MomentumLayer,
)
