"""Routers: tokens [N, D] -> which k of E experts each token uses, and with what gate weight.

A router is a module built as `Router(d_model, config)` whose `forward(x_ND, k)` returns a `Routing`; one that is not here is one file in
this folder and one line in `registry.ROUTERS`. Shape suffixes: N tokens, D model width, E experts, K active experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import NoOptions, build_options

if TYPE_CHECKING:
    pass


class Routing(NamedTuple):
    """indices [N, K] int64, no expert twice in a row; weights [N, K]; losses by name, each a scalar already times its coefficient."""

    indices_NK: Tensor
    weights_NK: Tensor
    losses: dict[str, Tensor]


class Router(nn.Module):
    """Base of routers. `Options`: what may be set, filled from the configuration. `needs`: what of the host it has to see, "tokens" for the
    token ids, which then stand in `shared.tokens`. `uses`: of balance_loss and gate_weight those that change something. Parameters are
    trained unless `frozen_by_default` or the configuration says otherwise.
    """

    Options: type = NoOptions
    needs: frozenset[str] = frozenset()
    uses: tuple[str, ...] = ()
    frozen_by_default = False
    shared: Shared | None = None

    def __init__(self, config: SMoEConfig):
        super().__init__()
        self.options = build_options(self.Options, config.options, known=dict.fromkeys(config.options))
        self.num_experts, self.gate_weight = config.num_experts, config.gate_weight
        self.freeze = self.frozen_by_default if config.freeze_router is None else config.freeze_router

    def weigh(self, top_NK: Tensor) -> Tensor:
        """Gate weights of the k kept logits: their softmax, or 1/k each."""
        return top_NK.softmax(-1) if self.gate_weight == "softmax" else torch.full_like(top_NK, 1 / top_NK.shape[1])

    def flops(self, tokens: int) -> int:
        """Operations of routing so many tokens."""
        return 0

    def computed(self, k: int) -> int:
        """Experts computed for a token at k."""
        return k


class LinearRouter(Router):
    """h(x) = W x + b; the k largest logits choose, their softmax weighs (paper section 3.1; official custom_gate.py:40-46).

    W ~ N(0, init_std^2) and b = 0. Logits are computed in float32 at least, whatever the precision of the model, so that bf16 changes no
    choice by rounding them. Subclasses say whether they are frozen and what load balance they want unless the configuration does.
    """

    uses = ("balance_loss", "gate_weight")
    balance_by_default = 0.0

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model).normal_(0.0, config.init_std))
        self.bias = nn.Parameter(torch.zeros(config.num_experts))
        self.balance_loss = self.balance_by_default if config.balance_loss is None else config.balance_loss
        self.requires_grad_(not self.freeze)

    def logits(self, x_ND: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def choose(self, logits_NE: Tensor, k: int) -> Routing:
        """The k largest logits, their weights, and in training the load balance."""
        top_NK, indices_NK = logits_NE.topk(k, dim=-1)
        losses = {}
        if self.balance_loss > 0 and self.training:
            losses["balance"] = self.balance_loss * switch_balance_loss(logits_NE, indices_NK)
        return Routing(indices_NK, self.weigh(top_NK), losses)

    def forward(self, x_ND: Tensor, k: int) -> Routing:
        return self.choose(self.logits(x_ND), k)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.weight.numel()


class RandomRouter(LinearRouter):
    """SMoE-Dropout's router: drawn once, never trained."""

    frozen_by_default = True


class LearnedRouter(LinearRouter):
    """The usual SMoE router: trained with the model, with the Switch load-balance loss."""

    balance_by_default = 0.01


class NoRouter(Router):
    """Of methods that draw experts themselves."""

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)

    def forward(self, x_ND: Tensor, k: int) -> Routing:
        raise RuntimeError("router 'none' chooses nothing: it is for methods that draw experts themselves")


def switch_balance_loss(logits_NE: Tensor, indices_NK: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6): f_e the share of assignments that expert e got, P_e its mean router
    probability; 1 when balanced. Over several processes f is the share in the global batch, so that a mean over processes weighted by their
    tokens is the loss of the whole batch.
    """
    num_experts = logits_NE.shape[-1]
    flat_M = indices_NK.flatten()
    ones_M = torch.ones_like(flat_M, dtype=logits_NE.dtype)
    assigned_E = logits_NE.new_zeros(num_experts).scatter_add(0, flat_M, ones_M)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(assigned_E)
    share_E = assigned_E / assigned_E.sum().clamp(min=1)
    probability_E = logits_NE.softmax(-1).sum(0) / max(len(logits_NE), 1)
    return num_experts * (share_E * probability_E).sum()


class Shared:
    """What the MoE layers of one model share within one forward pass. `moefy` gives one to all of them.

    tokens: the token ids the model was given, where a layer or router needs them. carried: what a layer hands on to the next one.
    """

    def __init__(self):
        self.tokens: Tensor | None = None
        self.carried: Tensor | None = None

    def see_tokens(self, _embedding: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """A forward pre-hook of the host's token embedding."""
        self.tokens = inputs[0] if inputs else named["input"]

    def __getstate__(self) -> dict:  # what belongs to a pass can be neither copied nor pickled
        return {"tokens": None, "carried": None}
