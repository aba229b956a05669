"""MomentumSMoE: layers of a model as steps of gradient descent with momentum (Teo and Nguyen 2024, arXiv 2410.14574).

Heavy ball across depth, with m = 0 before the first MoE layer of every forward pass: m <- mu m + gamma f(x), where f is the layer's
weighted sum of experts. As in the authors' code (rachtsy/MomentumSMoE, b43846f) the layer has a residual and a LayerNorm of its own and
returns LN(x - m), to which the model adds its residual and norm: norm2(x + LN(x - m)). AdamSMoE: in the first layer the step is p / sqrt(v
+ 1e-8) with p = (1 - beta1) f and v = (1 - beta2) f^2 (averages that start from 0, without bias correction); the authors add x to it before
they subtract it from x, so that the inner residual cancels and the layer returns LN(-adam_gamma p / sqrt(v + 1e-8)). m is updated as
before, and later layers take the heavy ball.

Option own_norm=false is the paper's equation without a second residual: the layer returns m (Adam: the step) with the sign absorbed by f,
and the model's residual adds it. f is taken before the model's dropout, in the authors' code after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import option, require
from smoe_dropout.routers import Routing


@dataclass(frozen=True)
class Options:
    """Options of MomentumSMoE and AdamSMoE.

    mu: momentum, 0.7 as in the authors' scripts (their code's default is 0.9). gamma: step size of m (their --gamma2).
    own_norm: whether the layer has a residual and a norm of its own, besides those of the model.
    adam: use an Adam step in the first layer, with beta1, beta2 and step size adam_gamma (their --gamma1).
    """

    mu: float = 0.7
    gamma: float = 1.0
    adam: bool = False
    adam_gamma: float = option(1.0, needs="adam")
    beta1: float = option(0.9, needs="adam")
    beta2: float = option(0.999, needs="adam")
    own_norm: bool = option(True, earlier=False)

    def __post_init__(self):
        for name in ("mu", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"option {name} = {getattr(self, name)} must be from 0 to below 1")


class MomentumLayer(MoELayer):
    """MoE layer that takes a step of descent; the momentum is passed from layer to layer within a pass."""

    Options = Options
    repeatable = False  # its momentum comes from earlier layers, which are not recomputed with it

    def __init__(self, d_model: int, *arguments):
        super().__init__(d_model, *arguments)
        like = self.experts.bias_up
        self.norm = nn.LayerNorm(d_model, device=like.device, dtype=like.dtype) if self.options.own_norm else None

    def combine(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The layer's output [N, D]; also updates the momentum."""
        f_ND, o = super().combine(x_ND, routing), self.options
        before = None if self.index == 0 else self.shared.carried
        m_ND = o.gamma * f_ND if before is None else o.mu * before + o.gamma * f_ND
        self.shared.carried = m_ND if self.index < self.count - 1 else None  # not kept beyond the pass
        if o.adam and self.index == 0:
            f_ND = f_ND.to(torch.promote_types(f_ND.dtype, torch.float32))
            p, v = (1 - o.beta1) * f_ND, (1 - o.beta2) * f_ND**2
            step_ND = (o.adam_gamma * p / torch.sqrt(v + 1e-8)).to(m_ND.dtype)
            return step_ND if self.norm is None else self.norm(-step_ND).to(m_ND.dtype)
        return m_ND if self.norm is None else self.norm(x_ND - m_ND).to(m_ND.dtype)


METHOD = Method(
    name="momentumsmoe",
    title="MomentumSMoE",
    source="arXiv 2410.14574",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=MomentumLayer,
)
