"""The MoE feed-forward layer: route -> experts -> combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.options import NoOptions, build_options
from smoe_dropout.recomputation import Pass, check, recomputing, remembered
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.routers import Routing, Shared
from smoe_dropout.training import FollowsTraining


class MoELayer(nn.Module, FollowsTraining):
    """[..., D] -> [..., D]: y = scale * sum_{i in top-k} g_i E_i(x) (paper section 3.1), in place of a feed-forward network.

    A method that routes or combines otherwise overrides `route` or `combine`. After a forward pass `losses` holds the auxiliary losses and
    `assigned` the indices [N, K] of that pass.

    Options: what a method's layer lets one set. needs: what of the host it has to see: "attention", that there is an attention module
    before it, which then stands in `attention`; "probabilities", that it keeps them. index of count: its place among the MoE layers.
    own_losses: whether it has auxiliary losses besides its router's. repeatable: whether a pass can be repeated for its gradient, one
    layer alone, as activation checkpointing does.
    """

    Options: type = NoOptions
    needs: frozenset[str] = frozenset()
    own_losses = False
    repeatable = True

    def __init__(self, d_model: int, experts: Experts, config: SMoEConfig):
        super().__init__()
        self.config = config
        self.options = build_options(self.Options, config.options, known=dict.fromkeys(config.options))
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.output_scale = float(config.num_experts) if config.output_scale == "dense" else 1.0
        self.router: nn.Module = load(ROUTERS, "router", config.router)(d_model, config)
        self.router.to(experts.up.device, torch.promote_types(experts.up.dtype, torch.float32))
        self.experts = experts
        self.losses: dict[str, Tensor] = {}
        self.assigned: Tensor | None = None
        self.last_pass: Pass | None = None
        self.index, self.count, self.shared = 0, 1, Shared()
        self._before: list[nn.Module] = []  # in a list, so that it does not become a child

    @property
    def attention(self) -> nn.Module | None:
        """The host's attention module before this layer, for a layer or router that needs it."""
        return self._before[0] if self._before else None

    def place(self, index: int, count: int, shared: Shared, attention: nn.Module | None) -> None:
        """Told by `moefy` where in the model the layer stands."""
        self.index, self.count, self.shared = index, count, shared
        self.router.shared = shared
        self._before = [] if attention is None else [attention]

    def forward(self, x: Tensor) -> Tensor:
        routing = self.route(x)
        if not torch.compiler.is_compiling() and self.assigned is None:
            check_routing(routing, x.numel() // max(x.shape[-1], 1), self.top_k, self.num_experts)
        self.keep(x, routing.losses, routing.indices_NK.detach())
        return self.combine(x.reshape(-1, x.shape[-1]), routing).view_as(x)

    def keep(self, x: Tensor, losses: dict[str, Tensor], assigned_NK: Tensor) -> None:
        """Notes what a pass leaves behind. RuntimeError where a pass is repeated for its gradient and cannot be, or is not the same."""
        if not recomputing():
            self.losses, self.assigned = losses, assigned_NK
            if not torch.compiler.is_compiling():
                known = remembered(x, self.top_k, losses, self.training)
                if known is not None or "tokens" in self.router.needs:  # the tokens are now those of this pass
                    self.last_pass = known
            return
        if not self.repeatable:
            raise RuntimeError(
                f"{type(self).__name__} cannot repeat a pass for its gradient, one layer alone: train without gradient checkpointing"
            )
        check(self.last_pass, x, self.top_k, losses)

    def route(self, x: Tensor) -> Routing:
        """x [..., D] -> the routing of its N tokens."""
        return self.router(x.reshape(-1, x.shape[-1]), self.top_k)

    def combine(self, x_ND: Tensor, routing: Routing) -> Tensor:
        return self.experts(x_ND, routing.indices_NK, self.scaled(routing.weights_NK))

    def scaled(self, weights: Tensor) -> Tensor:
        """Gate weights times the output scale."""
        return weights if self.output_scale == 1.0 else weights * self.output_scale

    def load(self) -> Tensor:
        """Share of the last pass's assignments that went to each expert [E]; sums to 1."""
        if self.assigned is None:
            raise RuntimeError("this layer has not run yet, so no expert has a load")
        counts_E = torch.bincount(self.assigned.flatten(), minlength=self.num_experts)
        return counts_E / counts_E.sum().clamp(min=1)

    def routing_parameters(self) -> list[nn.Parameter]:
        """What decides the route: frozen and thawed together."""
        return list(self.router.parameters())

    @property
    def computed_experts(self) -> int:
        """Experts computed for a token: k, unless the router or the last pass took more."""
        return self.router.computed(self.top_k)

    def routing_flops(self, lanes: int, positions: int) -> int:
        """Operations of routing `lanes` sequences of so many positions."""
        return self.router.flops(lanes * positions)

    def __getstate__(self) -> dict:
        # what the last pass left belongs to its autograd graph, which can be neither copied nor pickled
        return {**self.__dict__, "losses": {}, "assigned": None, "last_pass": None}


def check_routing(routing: Routing, tokens: int, k: int, num_experts: int) -> None:
    """Of a layer's first pass: TypeError or ValueError where a router, perhaps one of the user's, returns what experts cannot take."""
    if not isinstance(routing, Routing):
        raise TypeError(f"the router returned a {type(routing).__name__}, not a Routing(indices_NK, weights_NK, losses)")
    indices_NK, weights_NK, losses = routing
    found = f"the router returned indices {tuple(indices_NK.shape)} of {indices_NK.dtype} and weights {tuple(weights_NK.shape)}"
    if indices_NK.dtype != torch.int64 or indices_NK.shape != weights_NK.shape or indices_NK.dim() != 2 or len(indices_NK) != tokens:
        raise ValueError(f"{found}: both must be [{tokens} tokens, k = {k}], the indices int64")
    if indices_NK.shape[1] < k:
        raise ValueError(f"{found}: at k = {k} a token needs as many experts")
    if tokens and (indices_NK.min() < 0 or indices_NK.max() >= num_experts):
        raise ValueError(f"the router chose expert {int(indices_NK.max())}, and there are 0 to {num_experts - 1}")
    if (indices_NK.sort(1).values.diff(dim=1) == 0).any():
        raise ValueError("the router chose an expert twice for one token: its k experts must differ")
    if wrong := [name for name, loss in losses.items() if not isinstance(loss, Tensor) or loss.dim()]:
        raise ValueError(f"the router's loss {wrong[0]!r} must be a scalar tensor")
