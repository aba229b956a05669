"""Competition of experts, which CompeteSMoE and its successor share: a layer that in some steps runs all experts and uses the strongest."""

import math
import random
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.options import option, require
from smoe_dropout.recomputation import recomputing
from smoe_dropout.routers import active
from smoe_dropout.selection import largest
from smoe_dropout.training import Reports, synchronized


@dataclass(frozen=True)
class Options:
    """Options of CompeteSMoE and its successor.

    flip_rate: probability of competition per layer and step. decreasing: 2 / (2 + sqrt(e + 1)) instead, in epoch e of `epochs`.
    affinity: an expert's response; "norm" weighs by softmax, "softplus", mean softplus(E_i(x)), by s_S / sum.
    target: softmax of the responses of the k winners, 0 for the others, or of all experts. detach: whether it is a constant.
    router_loss: weight of the router's loss. times_balance: multiply it by the coefficient of the balance loss as well.
    winners_loss: theta, weight in it of a second MSE over the k winners only, between both softmax over all experts.
    diversity_loss: weight of the mean cosine similarity of the winners' outputs, over all k x k pairs, 0 for those of one expert.
    predrawn: at most `max_layers` layers compete in a step, and none during the first `warm_up` fraction of training. moved: a competition
    beyond that is dropped, or with `moved` moved to the nearest earlier step with room, or else to the next later one.
    """

    flip_rate: float = option(1.0, earlier=0.03)
    affinity: Literal["norm", "softplus"] = "norm"
    predrawn: bool = False
    max_layers: int = option(2, needs="predrawn")
    warm_up: float = option(0.05, needs="predrawn")
    router_loss: float = option(5.0, earlier=1.0)
    target: Literal["winners", "all"] = option("winners", earlier="all")
    detach: bool = option(False, earlier=True)
    times_balance: bool = option(True, earlier=False)
    decreasing: bool = False
    epochs: int = option(80, needs="decreasing")
    winners_loss: float = 0.0
    diversity_loss: float = 0.0
    moved: bool = option(False, needs="predrawn")

    def __post_init__(self):
        require(0 <= self.flip_rate <= 1, f"option flip_rate = {self.flip_rate} must be from 0 to 1")
        require(0 <= self.warm_up < 1, f"option warm_up = {self.warm_up} must be from 0 to below 1")
        for name in ("max_layers", "epochs"):
            require(getattr(self, name) >= 1, f"option {name} = {getattr(self, name)} must be at least 1")
        for name in ("router_loss", "winners_loss", "diversity_loss"):
            require(getattr(self, name) >= 0, f"option {name} = {getattr(self, name)} must not be negative")
        require(not (self.predrawn and self.decreasing), "option predrawn draws at one rate: leave decreasing out")


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
        """Decide whether this layer competes in the current step. Before `set_progress`, `predrawn` and `decreasing` warn and never do."""
        o = self.options
        if self.step is None and (o.predrawn or o.decreasing):
            sentence = "no layer competes before smoe_dropout.set_progress(model, step, total_steps): call it before each training step"
            warnings.warn(sentence, stacklevel=2)
            return False
        if self.step is None:
            return bool(synchronized(torch.rand((), device=self.experts.up.device)) < o.flip_rate)
        seed = int(self.seed)
        if not o.predrawn:
            rate = flip_rate(self.step * o.epochs // self.total_steps) if o.decreasing else o.flip_rate
            return self.index in competing_layers(seed, self.step, self.count, rate, self.count)
        begin = int(o.warm_up * self.total_steps) if o.moved else math.ceil(o.warm_up * self.total_steps)
        if self.step < begin:
            return False
        if not o.moved:
            return self.index in competing_layers(seed, self.step, self.count, o.flip_rate, o.max_layers)
        plan = competition_plan(seed, self.total_steps - begin, self.count, o.flip_rate, o.max_layers)
        return self.step < self.total_steps and bool(plan[self.index][self.step - begin])

    def compete(self, x: Tensor) -> Tensor:
        """Run all experts, combine the k with the strongest responses [N, D], and store the losses of the competition."""
        self.see_padding(x)
        o, x_ND, k = self.options, x.reshape(-1, x.shape[-1]), self.selection(x)
        norm = o.affinity == "norm"
        outputs_NED = self.experts.each(x_ND)
        affinity_NE = affinities(outputs_NED, o.affinity)
        top_NK, indices_NK = affinity_NE.topk(largest(k), dim=-1)
        active_NK = active(k, affinity_NE if norm else affinity_NE.log(), indices_NK)
        if active_NK is None:
            winners_NK = top_NK.softmax(-1)
        else:
            winners_NK, top_NK = top_NK.masked_fill(~active_NK, -torch.inf).softmax(-1), top_NK.masked_fill(~active_NK, 0.0)
        weights_NK = winners_NK if norm else top_NK / top_NK.sum(-1, keepdim=True)
        logits_NE, real_N = self.router.logits(x_ND), self.router.real_N
        self.router.show(logits_NE)
        chosen_NKD = outputs_NED.gather(1, indices_NK[..., None].expand(-1, -1, outputs_NED.shape[-1]))
        losses = self.competition_losses(logits_NE.softmax(-1), affinity_NE, winners_NK, indices_NK, active_NK, real_N)
        if o.diversity_loss:
            losses["diversity"] = o.diversity_loss * diversity(chosen_NKD, active_NK, real_N)
        self.keep(x, losses, indices_NK if active_NK is None else indices_NK.masked_fill(~active_NK, -1))
        return (chosen_NKD * self.scaled(weights_NK)[..., None].to(chosen_NKD.dtype)).sum(1)

    def competition_losses(self, shares_NE, affinity_NE, winners_NK, indices_NK, active_NK, real_N) -> dict[str, Tensor]:
        """The router's loss. shares: the router's softmax. winners: softmax of the winners' responses, 0 where not active."""
        o, softmax_NE = self.options, affinity_NE.softmax(-1)
        target_NE = softmax_NE if o.target == "all" else torch.zeros_like(affinity_NE).scatter(1, indices_NK, winners_NK)
        if o.detach:
            target_NE, softmax_NE = target_NE.detach(), softmax_NE.detach()
        loss = squared_error(shares_NE, target_NE, real_N)
        if o.winners_loss:
            ours_NK, theirs_NK = (some_NE.gather(1, indices_NK) for some_NE in (shares_NE, softmax_NE))
            loss = loss + o.winners_loss * squared_error(ours_NK, theirs_NK, real_N, active_NK)
        return {"router": o.router_loss * (self.router.balance_loss if o.times_balance else 1.0) * loss}

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


def squared_error(ours_NX: Tensor, theirs_NX: Tensor, real_N: Tensor | None, active_NX: Tensor | None = None) -> Tensor:
    """Mean squared difference over the real tokens and active entries; None: all of them."""
    squares_NX = (ours_NX - theirs_NX).square()
    if real_N is None and active_NX is None:
        return squares_NX.sum() / squares_NX.numel()  # not F.mse_loss, whose gradient rounds differently from that with a mask
    counted_NX = torch.ones_like(ours_NX, dtype=torch.bool) if active_NX is None else active_NX
    counted_NX = counted_NX if real_N is None else counted_NX & real_N[:, None]
    return (squares_NX * counted_NX).sum() / counted_NX.sum().clamp(min=1)


def diversity(outputs_NKD: Tensor, active_NK: Tensor | None, real_N: Tensor | None) -> Tensor:
    """Mean cosine similarity over the K x K pairs of a token's outputs, where that of an output with itself counts as 0."""
    directions_NKD = F.normalize(outputs_NKD.to(torch.promote_types(outputs_NKD.dtype, torch.float32)), dim=-1)
    if active_NK is not None:
        directions_NKD = directions_NKD * active_NK[..., None]
    N, K, _ = directions_NKD.shape
    pairs_NKK = directions_NKD @ directions_NKD.mT * (1 - torch.eye(K, device=outputs_NKD.device))
    if active_NK is None and real_N is None:
        return pairs_NKK.mean()
    pairs_N = torch.full((N,), K * K, device=outputs_NKD.device) if active_NK is None else active_NK.sum(-1) ** 2
    pairs_N = pairs_N if real_N is None else pairs_N * real_N
    return (pairs_NKK.sum((1, 2)) * (1 if real_N is None else real_N)).sum() / pairs_N.sum().clamp(min=1)


def flip_rate(epoch: int) -> float:
    """Falling probability of competition (--freq_type function of the code of arXiv 2402.02526): 2 / (2 + sqrt(e + 1)), from 2/3."""
    return 2 / (2 + math.sqrt(epoch + 1))


@lru_cache(maxsize=8)
def competing_layers(seed: int, step: int, layers: int, rate: float, most: int) -> frozenset[int]:
    """Layers that compete in a step: each with probability `rate`, at most `most` of them."""
    generator = random.Random(seed * 2**40 + step)
    found = [layer for layer in range(layers) if generator.random() < rate]
    return frozenset(found if len(found) <= most else generator.sample(found, most))


@lru_cache(maxsize=2)
def competition_plan(seed: int, steps: int, layers: int, rate: float, most: int) -> tuple[bytes, ...]:
    """For each layer, whether it competes in each step (arXiv 2505.13380): drawn with probability `rate`, layer by layer.

    Where `most` layers compete already, a competition moves to the nearest earlier step with room, or else to the next later one.
    """
    generator, taken, plan = random.Random(seed * 2**40), bytearray(steps), []
    most = min(most, 255)
    for _ in range(layers):
        own, room, waiting = bytearray(steps), [], 0  # room: earlier steps where this layer could compete, the nearest last
        for step in range(steps):
            drawn, free = generator.random() < rate, taken[step] < most
            if drawn and not free and room:
                own[room.pop()] = 1
            elif drawn and not free:
                waiting += 1
            elif drawn or (waiting and free):
                own[step] = 1
                waiting -= not drawn
            elif free:
                room.append(step)
        taken, plan = bytearray(map(sum, zip(taken, own, strict=True))), [*plan, bytes(own)]
    return tuple(plan)
