"""The MoE feed-forward layer: route -> experts -> combine."""

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.routers import Routing


class MoELayer(nn.Module):
    """[..., D] -> [..., D]: y = scale * sum_{i in top-k} g_i E_i(x) (paper section 3.1), in place of a feed-forward network.

    A method that routes or combines otherwise overrides `route` or `combine`. After a forward pass `losses` holds the router's auxiliary
    losses and `assigned` the indices [N, K] of that pass.
    """

    def __init__(self, d_model: int, experts: Experts, config: SMoEConfig):
        super().__init__()
        self.config = config
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.output_scale = float(config.num_experts) if config.output_scale == "dense" else 1.0
        self.router: nn.Module = load(ROUTERS, "router", config.router)(d_model, config)
        self.router.to(experts.up.device, torch.promote_types(experts.up.dtype, torch.float32))
        self.experts = experts
        self.losses: dict[str, Tensor] = {}
        self.assigned: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        routing = self.route(x_ND)
        self.losses, self.assigned = routing.losses, routing.indices_NK.detach()
        return self.combine(x_ND, routing).view_as(x)

    def route(self, x_ND: Tensor) -> Routing:
        return self.router(x_ND, self.top_k)

    def combine(self, x_ND: Tensor, routing: Routing) -> Tensor:
        weights_NK = routing.weights_NK if self.output_scale == 1.0 else routing.weights_NK * self.output_scale
        return self.experts(x_ND, routing.indices_NK, weights_NK)

    def load(self) -> Tensor:
        """Share of the last pass's assignments that went to each expert [E]; sums to 1."""
        if self.assigned is None:
            raise RuntimeError("this layer has not run yet, so no expert has a load")
        counts_E = torch.bincount(self.assigned.flatten(), minlength=self.num_experts)
        return counts_E / counts_E.sum().clamp(min=1)

    def __getstate__(self) -> dict:
        # what the last pass left belongs to its autograd graph, which can be neither copied nor pickled
        return {**self.__dict__, "losses": {}, "assigned": None}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, output_scale={self.config.output_scale}"
