"""CompeteSMoE: occasionally runs all experts, uses those with the strongest responses, and distils them into the router.

Pham et al. 2024 (arXiv 2402.02526): in a competition step s_i = ||E_i(x)||_2, y = sum over the top-k of s with weights softmax(s_S), and
the router's loss is MSE(softmax(router logits), softmax(s)) with a detached target. All other steps, and inference, use an ordinary learned
top-k router with its balance loss. Each layer draws at random whether to compete in a step. Options of the successor (Nguyen et al. 2025,
arXiv 2505.13380): affinity "softplus", mean softplus(E_i(x)), with weights s_S / sum; a predrawn plan of competition steps with at most two
layers per step, after a warm-up.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import require
from smoe_dropout.recomputation import recomputing
from smoe_dropout.routers import active
from smoe_dropout.selection import largest
from smoe_dropout.training import Reports, synchronized


@dataclass(frozen=True)
class Options:
    """Options of CompeteSMoE.

    flip_rate: probability of competition per layer and step (successor: 0.07). affinity: measure of an expert's response.
    predrawn: at most `max_layers` layers compete in a step, and none during the first `warm_up` fraction of training.
    router_loss: weight of the distillation loss (successor: 0.01).
    """

    flip_rate: float = 0.03
    affinity: Literal["norm", "softplus"] = "norm"
    predrawn: bool = False
    max_layers: int = 2
    warm_up: float = 0.05
    router_loss: float = 1.0

    def __post_init__(self):
        require(0 <= self.flip_rate <= 1, f"option flip_rate = {self.flip_rate} must be from 0 to 1")
        require(0 <= self.warm_up < 1, f"option warm_up = {self.warm_up} must be from 0 to below 1")
        require(self.max_layers >= 1, f"option max_layers = {self.max_layers} must be at least 1")
        require(self.router_loss >= 0, f"option router_loss = {self.router_loss} must not be negative")


class CompeteLayer(MoELayer, Reports):
    """MoE layer with competition steps, for routers with `logits`.

    After `set_progress` the competing layers of a step are derived from `seed`, torch's initial seed when the model was built; without it
    they are drawn from torch's default generator. `passes` and `competitions` count training passes and those with competition. All three
    are buffers, saved with the model and taken from the first process in data parallelism.
    """

    Options = Options
    own_losses = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for name, value in (("passes", 0), ("competitions", 0), ("seed", torch.initial_seed() % 2**63)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64, device=self.experts.up.device))
        self.competed = False

    def run(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        self.competed = self.training and self.flips()
        if self.training and not recomputing():
            self.passes += 1
            self.competitions += self.competed
        return self.compete(x).view_as(x) if self.competed else super().run(x)

    def flips(self) -> bool:
        """Whether this layer competes in the current step. RuntimeError with `predrawn` before `set_progress`."""
        o = self.options
        if self.step is None and o.predrawn:
            raise RuntimeError("option predrawn needs smoe_dropout.set_progress(model, step, total_steps) before each step")
        if self.step is None:
            return bool(synchronized(torch.rand((), device=self.experts.up.device)) < o.flip_rate)
        if o.predrawn and self.step < o.warm_up * self.total_steps:
            return False
        most = o.max_layers if o.predrawn else self.count
        return self.index in competing_layers(int(self.seed), self.step, self.count, o.flip_rate, most)

    def compete(self, x: Tensor) -> Tensor:
        """Run all experts, combine the k with the strongest responses [N, D], and store the router's distillation loss."""
        self.see_padding(x)
        x_ND, k, norm = x.reshape(-1, x.shape[-1]), self.selection(x), self.options.affinity == "norm"
        outputs_NED = self.experts.each(x_ND)
        affinity_NE = affinities(outputs_NED, self.options.affinity)
        top_NK, indices_NK = affinity_NE.topk(largest(k), dim=-1)
        active_NK = active(k, affinity_NE if norm else affinity_NE.log(), indices_NK)
        if active_NK is not None:
            top_NK = top_NK.masked_fill(~active_NK, -torch.inf if norm else 0.0)
        weights_NK = top_NK.softmax(-1) if norm else top_NK / top_NK.sum(-1, keepdim=True)
        target_NE = affinity_NE.detach().softmax(-1)
        logits_NE, real_N = self.router.logits(x_ND), self.router.real_N
        self.router.show(logits_NE)
        if real_N is None:
            distillation = F.mse_loss(logits_NE.softmax(-1), target_NE)
        else:
            error_NE = (logits_NE.softmax(-1) - target_NE).square() * real_N[:, None]
            distillation = error_NE.sum() / (real_N.sum().clamp(min=1) * self.num_experts)
        assigned_NK = indices_NK if active_NK is None else indices_NK.masked_fill(~active_NK, -1)
        self.keep(x, {"router": self.options.router_loss * distillation}, assigned_NK)
        chosen_NKD = outputs_NED.gather(1, indices_NK[..., None].expand(-1, -1, outputs_NED.shape[-1]))
        return (chosen_NKD * self.scaled(weights_NK)[..., None].to(chosen_NKD.dtype)).sum(1)

    @property
    def computed_experts(self) -> int:
        """Experts computed per token: all of them in a competition step."""
        return self.num_experts if self.competed else super().computed_experts

    def metrics(self) -> dict[str, float]:
        """Fraction of training passes with competition, and the extra expert FLOPs they cost, relative to k experts."""
        share = self.competitions.item() / max(self.passes.item(), 1)
        return {"competition_share": share, "extra_expert_flops": share * (self.num_experts - self.top_k) / self.top_k}


def affinities(outputs_NED: Tensor, kind: str) -> Tensor:
    """Strength of each expert's response [N, E], in float32 or higher."""
    outputs_NED = outputs_NED.to(torch.promote_types(outputs_NED.dtype, torch.float32))
    return outputs_NED.norm(dim=-1) if kind == "norm" else F.softplus(outputs_NED).mean(-1)


@lru_cache(maxsize=8)
def competing_layers(seed: int, step: int, layers: int, rate: float, most: int) -> frozenset[int]:
    """Layers that compete in a step: each with probability `rate`, at most `most` of them."""
    generator = random.Random(seed * 2**40 + step)
    found = [layer for layer in range(layers) if generator.random() < rate]
    return frozenset(found if len(found) <= most else generator.sample(found, most))


METHOD = Method(
    name="competesmoe",
    title="CompeteSMoE",
    source="arXiv 2402.02526; arXiv 2505.13380",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=CompeteLayer,
    routers=("learned", "random"),
)
