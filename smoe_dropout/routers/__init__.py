"""Routers: tokens [N, D] -> the k of E experts of each token, with their gate weights.

A router is a module built as `Router(d_model, config)` whose `forward(x_ND, k)` returns a `Routing`. To add one, write a file in this
folder and add a line to `registry.ROUTERS`. k is a number; a router that sets `ragged` also takes a `TokenK`, with a k for each token [N],
and a `GateMass`. Shape suffixes: N tokens, D model width, E experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.options import ConfigError, NoOptions, build_options
from smoe_dropout.precision import without_autocast
from smoe_dropout.regression import Ridge, log_strength
from smoe_dropout.selection import GateMass, Selection, TokenK, largest
from smoe_dropout.shared import Shared


class Routing(NamedTuple):
    """indices [N, K] int64, distinct in each row; weights [N, K]; losses by name, scalars already multiplied by their coefficients.

    ragged: whether a token may have fewer than K experts: index -1, with weight 0, stands for none.
    """

    indices_NK: Tensor
    weights_NK: Tensor
    losses: dict[str, Tensor]
    ragged: bool = False


class Router(nn.Module):
    """Base class of routers.

    Class attributes for subclasses:
    Options: options of the router, a frozen dataclass; filled from the configuration as `options`.
    needs: {"tokens"} if the router needs token ids, which are then in `shared.tokens`.
    uses: which of the settings "balance_loss", "gate_weight" and "shared_experts" have an effect.
    frozen_by_default: whether parameters are frozen unless the configuration sets `freeze_router`.
    ragged: whether `forward` takes a k for each token and a gate mass, false in a subclass whose own `forward` does not say so. To others
        the tokens of each k are given separately.
    variable: whether the number of experts differs from token to token although k is one number, which then is the most of them or, where
        the router's file says so, their mean.
    trains_at_any_k: the setting with which the task trains the router at any k.
    loads: how often weights have been loaded into routers, of any model.

    For its losses `forward` finds in `real_N`, bool [N], which tokens are real rather than padding; None: all. Parameters stay in float32
    or higher, whatever the model's precision. A buffer that `forward` changes is changed once, also if
    activation checkpointing repeats it.
    """

    Options: type = NoOptions
    needs: frozenset[str] = frozenset()
    uses: tuple[str, ...] = ()
    frozen_by_default = False
    ragged = False
    variable = False
    trains_at_any_k = "gate_weight = 'pre_softmax' or 'sigmoid'"
    shared: Shared | None = None
    loads = 0

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        if "forward" in vars(cls) and "ragged" not in vars(cls):
            cls.ragged = False

    def __init__(self, config: SMoEConfig):
        super().__init__()
        self.options = build_options(self.Options, config.options, known=dict.fromkeys(config.options))
        self.num_experts, self.gate_weight = config.num_experts, config.gate_weight
        self.freeze = self.frozen_by_default if config.freeze_router is None else config.freeze_router
        if config.gate_weight == "unit":
            self.register_buffer("factor", torch.ones(config.num_experts))  # of the experts' sum, at k = 1 .. E

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        Router.loads += 1

    @property
    def real_N(self) -> Tensor | None:
        """Which tokens of the running layer are real, bool [N]; None: all."""
        return None if self.shared is None else self.shared.real_N

    @property
    def shown(self) -> list[Tensor] | None:
        """Logits of a pass that was asked to return them, one tensor for each use of the router; None for others."""
        return None if self.shared is None else self.shared.shown.get(self)

    def show(self, logits_NE: Tensor) -> None:
        """Keep the logits for a pass that was asked to return them."""
        if (shown := self.shown) is not None:
            shown.append(logits_NE)

    def weigh(self, top_NK: Tensor, active_NK: Tensor | None = None, logits_NE: Tensor | None = None) -> Tensor:
        """Gate weights of the k chosen logits, as `SMoEConfig.gate_weight` says; 0 for those that are not active (bool; None: all are).

        logits_NE: of all experts. ConfigError for "pre_softmax" without them.
        """
        if self.gate_weight == "softmax":
            return (top_NK if active_NK is None else top_NK.masked_fill(~active_NK, -torch.inf)).softmax(-1)
        if self.gate_weight == "uniform":
            if active_NK is None:
                return torch.full_like(top_NK, 1 / top_NK.shape[1])
            return active_NK / active_NK.sum(-1, keepdim=True, dtype=top_NK.dtype)
        if self.gate_weight == "unit":
            if active_NK is None:
                return self.factor[top_NK.shape[1] - 1].expand_as(top_NK)
            return active_NK * self.factor[active_NK.sum(-1, keepdim=True) - 1]
        if self.gate_weight == "sigmoid":
            weights_NK = top_NK.sigmoid()
        elif logits_NE is None:
            raise ConfigError(f"{type(self).__name__} gives weigh() no logits_NE of all experts, which gate_weight = 'pre_softmax' needs")
        else:
            weights_NK = (top_NK - logits_NE.logsumexp(-1, keepdim=True)).exp()
        return weights_NK if active_NK is None else weights_NK * active_NK

    def shares(self, logits_NE: Tensor) -> Tensor:
        """Values whose softmax is the router's probability [N, E]: the logits; for "sigmoid" the sigmoids divided by their sum."""
        return F.logsigmoid(logits_NE) if self.gate_weight == "sigmoid" else logits_NE

    @property
    def uniform(self) -> bool:
        """Return whether every chosen expert always weighs 1/k; a router with such weights of its own overrides it."""
        return "gate_weight" in self.uses and self.gate_weight == "uniform"

    @property
    def equal(self) -> bool:
        """Return whether the gate weights of a token's experts are always equal."""
        return self.uniform or ("gate_weight" in self.uses and self.gate_weight == "unit")

    @property
    def normalised(self) -> bool:
        """Return whether the gate weights of every token sum to 1; a router with weights of its own overrides it."""
        return self.uniform or ("gate_weight" in self.uses and self.gate_weight == "softmax")

    def learns_from_task(self, k: int) -> bool:
        """Return whether the gate weights depend on the router's parameters at up to k experts, so that the task trains them."""
        return not self.equal and not (k == 1 and self.normalised)

    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Fit the router without training it, so that it chooses the strongest experts; most routers have nothing to fit.

        inputs: of calibration tokens, in float32. strength: sum over an expert's neurons of |h_j(x)| * ||down_j||.
        """

    def flops(self, tokens: int) -> int:
        """FLOPs of routing this many tokens."""
        return 0

    def computed(self, k: int) -> int:
        """Experts computed per token at this k."""
        return k


class LogitRouter(Router):
    """Base class of routers with a logit of each expert, `logits(x [..., D]) -> [..., E]`: the k largest choose, their softmax weighs, or
    another `gate_weight`.

    Logits are computed in float32 or higher, whatever the model's precision, so that rounding in bf16 never changes which experts are
    chosen. Subclasses set whether the router is frozen and its default balance loss.
    """

    uses = ("balance_loss", "gate_weight", "shared_experts")
    ragged = True
    balance_by_default = 0.0

    def __init__(self, config: SMoEConfig):
        super().__init__(config)
        self.balance_loss = self.balance_by_default if config.balance_loss is None else config.balance_loss
        self.shared_experts = config.shared_experts

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to the k largest logits, with the balance loss in training mode."""
        self.show(logits_NE)
        top_NK, indices_NK = self.top(logits_NE, largest(k))
        active_NK = active(k, self.shares(logits_NE), indices_NK)
        if active_NK is not None:
            indices_NK = indices_NK.masked_fill(~active_NK, -1)
        losses = {}
        if self.balance_loss > 0 and self.training:
            losses["balance"] = self.balance_loss * self.imbalance(logits_NE, indices_NK)
        return Routing(indices_NK, self.weigh(top_NK, active_NK, logits_NE), losses, active_NK is not None)

    def imbalance(self, logits_NE: Tensor, indices_NK: Tensor) -> Tensor:
        """The balance loss without its coefficient."""
        return switch_balance_loss(self.shares(logits_NE), indices_NK, self.real_N)

    def top(self, logits_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The chosen logits and their indices [N, K], those of the shared experts first."""
        if not self.shared_experts:
            return logits_NE.topk(k, dim=-1)
        first_S = torch.arange(self.shared_experts, 0, -1, device=logits_NE.device)
        shared_NS = logits_NE.amax(-1, keepdim=True) + first_S
        indices_NK = torch.cat([shared_NS, logits_NE[:, self.shared_experts :]], 1).topk(k, dim=-1).indices
        return logits_NE.gather(1, indices_NK), indices_NK

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing."""
        return self.choose(self.logits(x_ND), k)

    @property
    def last(self) -> nn.Module:
        """The module whose own parameters and buffers have a row for each expert, or several blocks of such rows."""
        return self

    @torch.no_grad()
    def keep(self, experts: Sequence[int], members: int) -> None:
        """Reduce the router to these experts, in place, with their rows. members: number of experts that they stand for after a merger.

        The factor of k kept experts becomes that of the members that they stand for on average.
        """
        if "factor" in self._buffers:
            self.factor = self.factor[[round(k * members / len(experts)) - 1 for k in range(1, len(experts) + 1)]]
        blocks = {name: values for name, values in self.last.named_buffers(recurse=False) if name != "factor"}
        blocks = {name: values for name, values in blocks.items() if values.shape[:1] == (self.num_experts,)}
        for name, rows in [*self.last.named_parameters(recurse=False), *blocks.items()]:
            kept = rows.unflatten(0, (-1, self.num_experts))[:, list(experts)].flatten(0, 1)
            setattr(self.last, name, nn.Parameter(kept, rows.requires_grad) if isinstance(rows, nn.Parameter) else kept)
        self.num_experts = len(experts)


class LinearRouter(LogitRouter):
    """h(x) = W x + b (paper section 3.1; official custom_gate.py:40-46). W ~ N(0, init_std^2), b = 0."""

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model).normal_(0.0, config.init_std))
        self.bias = nn.Parameter(torch.zeros(config.num_experts))
        self.requires_grad_(not self.freeze)

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            return F.linear(x_ND.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    @torch.no_grad()
    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Regress the logarithm of the strengths on the inputs, so that the router's probabilities are shares of the strength."""
        weight_ED, bias_E = Ridge(inputs_TD).fit(log_strength(strength_TE))
        self.weight.copy_(weight_ED)
        if self.bias is not None:
            self.bias.copy_(bias_E)

    def flops(self, tokens: int) -> int:
        """FLOPs of the linear map."""
        return 2 * tokens * self.weight.numel()


class RandomRouter(LinearRouter):
    """SMoE-Dropout's router: randomly initialised and frozen."""

    frozen_by_default = True

    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Stay random."""


class LearnedRouter(LinearRouter):
    """The common SMoE router, trained with the model and the Switch load-balance loss."""

    balance_by_default = 0.01


class NoRouter(Router):
    """Placeholder for methods whose layers draw experts themselves."""

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """Raise RuntimeError."""
        raise RuntimeError("router 'none' does not choose experts: it is for methods that draw experts themselves")


def active(k: Selection, scores_NE: Tensor, indices_NK: Tensor) -> Tensor | None:
    """Which of the largest scores' experts a token uses, bool [N, K]; None if it uses all of them.

    scores: logits, or anything else whose softmax is the router's probability. indices: of the K first, in the router's order.
    """
    if isinstance(k, int):
        return None
    if isinstance(k, GateMass):
        top_NK = scores_NE.softmax(-1).gather(1, indices_NK)
        k_N = (top_NK.cumsum(-1) - top_NK < k.p).sum(-1).clamp(k.smallest, k.largest)
    else:
        k_N = k.values
    return torch.arange(indices_NK.shape[1], device=indices_NK.device) < k_N[:, None]


def evenly(indices_NK: Tensor, k: Selection) -> Routing:
    """Routing to the first k of these experts, each with weight 1/k."""
    if isinstance(k, int):
        return Routing(indices_NK, torch.full(indices_NK.shape, 1 / k, device=indices_NK.device, dtype=torch.float32), {})
    active_NK = torch.arange(indices_NK.shape[1], device=indices_NK.device) < k.values[:, None]
    weights_NK = active_NK / k.values[:, None].to(torch.float32)
    return Routing(indices_NK.masked_fill(~active_NK, -1), weights_NK, {}, True)


def route_by_k(router: Router, x_ND: Tensor, k: Selection) -> Routing:
    """Routing by a router that takes one k, which is given the tokens of each k separately. ConfigError for a gate mass.

    Losses are means over these parts, weighted by their tokens. ValueError if the router returns fewer experts than k.
    """
    if not isinstance(k, TokenK):
        raise ConfigError(f"{type(router).__name__} takes one k{' in training' * router.training}, not a gate mass: use top_k(model, k)")
    shared, real_N = router.shared or Shared(), router.real_N
    tokens, shown = shared.tokens, router.shown
    begin, parts, owns, losses = len(shown or ()), [], [], {}
    total = len(x_ND) if real_N is None else real_N.sum().clamp(min=1)
    for number in k.values.unique().tolist() or [k.largest]:
        own = (k.values == number).nonzero()[:, 0]
        if real_N is not None:
            shared.real_N = real_N[own]
        if tokens is not None:
            shared.tokens = tokens.flatten()[own]
        part = router(x_ND[own], number)
        if len(part.indices_NK) != len(own) or part.indices_NK.shape[1] < number:
            raise ValueError(
                f"the router returned indices {list(part.indices_NK.shape)} for {len(own)} tokens that need k = {number} experts each"
            )
        weight = (len(own) if real_N is None else shared.real_N.sum()) / total
        losses |= {name: losses.get(name, 0.0) + loss * weight for name, loss in part.losses.items()}
        parts.append(part)
        owns.append(own)
    shared.real_N, shared.tokens = real_N, tokens
    order_N, most = torch.cat(owns).argsort(), max(part.indices_NK.shape[1] for part in parts)
    if shown:
        shown[begin:] = [torch.cat(shown[begin:])[order_N]]
    indices_NK = torch.cat([F.pad(part.indices_NK, (0, most - part.indices_NK.shape[1]), value=-1) for part in parts])[order_N]
    weights_NK = torch.cat([F.pad(part.weights_NK, (0, most - part.weights_NK.shape[1])) for part in parts])[order_N]
    return Routing(indices_NK, weights_NK, losses, True)


def orthogonal(rows: int, columns: int, gain: float) -> nn.Parameter:
    """Parameter [rows, columns] drawn as `nn.init.orthogonal_` does, in float32, which its decomposition needs."""
    return nn.Parameter(nn.init.orthogonal_(torch.empty(rows, columns, dtype=torch.float32), gain))


def switch_balance_loss(logits_NE: Tensor, indices_NK: Tensor, real_N: Tensor | None = None, of_tokens: bool = False) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6), 1 when balanced.

    f_e is the fraction of assignments that expert e received, or of tokens (`of_tokens`; k when balanced), P_e its mean router probability,
    both over the real tokens (bool [N]; None: all). In a distributed run f_e is taken over the global batch, so that the mean over
    processes, weighted by their tokens, is the loss of the whole batch.
    """
    num_experts = logits_NE.shape[-1]
    share_E = assigned_shares(indices_NK, num_experts, logits_NE.dtype, real_N, of_tokens)
    return num_experts * (share_E * real_mean(logits_NE.softmax(-1), real_N)).sum()


def assigned_shares(
    indices_NK: Tensor, num_experts: int, dtype: torch.dtype, real_N: Tensor | None = None, of_tokens: bool = False
) -> Tensor:
    """Fraction of the real tokens' assignments that each expert received [E], or of the real tokens, over all processes."""
    counted_NK = (indices_NK >= 0).to(dtype)
    if real_N is not None:
        counted_NK = counted_NK * real_N[:, None]
    assigned_E = counted_NK.new_zeros(num_experts).scatter_add(0, indices_NK.clamp(min=0).flatten(), counted_NK.flatten())
    over_processes(assigned_E)
    if of_tokens:
        tokens = assigned_E.new_tensor(len(indices_NK)) if real_N is None else real_N.sum().to(dtype)
        return assigned_E / over_processes(tokens).clamp(min=1)
    return assigned_E / assigned_E.sum().clamp(min=1)


def over_processes(summed: Tensor) -> Tensor:
    """Sum of a tensor over all processes of a distributed run, in place; not differentiated."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(summed)
    return summed


def real_mean(values_N: Tensor, real_N: Tensor | None) -> Tensor:
    """Mean [...] of values [N, ...] over the real tokens (bool [N]; None: all)."""
    if real_N is None:
        return values_N.sum(0) / max(len(values_N), 1)
    return (values_N * real_N.view(-1, *[1] * (values_N.dim() - 1))).sum(0) / real_N.sum().clamp(min=1)
