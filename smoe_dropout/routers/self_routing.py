"""Self-Routing: a part of the hidden state is the logits (arXiv 2604.00421).

h_e(x) = x_e: the first E coordinates of the layer's input, without parameters; the k largest choose, their softmax weighs, and the model
learns to route through them. No balance loss. Which coordinates the authors use is not known to us.
"""

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.routers import LogitRouter


class SelfRouter(LogitRouter):
    """Router without parameters. Buffer: `places` [E], the coordinate of each expert."""

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        require(
            config.num_experts <= d_model, f"router 'self_routing' needs num_experts = {config.num_experts} of at most d_model = {d_model}"
        )
        self.register_buffer("places", torch.arange(config.num_experts))

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E]."""
        return x_ND[..., self.places].to(torch.promote_types(x_ND.dtype, torch.float32))

    def learns_from_task(self, k: int) -> bool:
        """Return whether gate weights depend on the router's parameters: it has none."""
        return True
