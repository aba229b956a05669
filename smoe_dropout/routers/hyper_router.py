"""HyperRouter: router weights that a frozen random network makes of a trained vector (Do et al. 2023, arXiv 2312.07035, section 3).

[W | b] = V ReLU(U r), with U [H, D] and V drawn from N(0, init_std^2) and frozen, and r [D] trained, from N(0, 1); then the k largest
W x + b choose and their softmax weighs, with k growing as in SMoE-Dropout. H = 256, and every layer has its own network, as in the
authors' code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import require
from smoe_dropout.precision import without_autocast
from smoe_dropout.routers import LogitRouter


@dataclass(frozen=True)
class Options:
    """hyper_size: H."""

    hyper_size: int = 256

    def __post_init__(self):
        require(self.hyper_size >= 1, f"option hyper_size = {self.hyper_size} must be at least 1")


class HyperRouter(LogitRouter):
    """Between a learned and a frozen router: D trained numbers. Buffers: `hidden` [1, H, D] and `out` [E, D + 1, H]."""

    Options = Options

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        size = self.options.hyper_size
        self.embedding = nn.ParameterList([torch.randn(d_model)])  # no parameter with rows of experts
        self.register_buffer("hidden", torch.empty(1, size, d_model).normal_(0.0, config.init_std))
        self.register_buffer("out", torch.empty(config.num_experts, d_model + 1, size).normal_(0.0, config.init_std))
        self.requires_grad_(not self.freeze)

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E]."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            made_ED = self.out.to(dtype) @ (self.hidden[0].to(dtype) @ self.embedding[0].to(dtype)).relu()
            return F.linear(x_ND.to(dtype), made_ED[:, :-1], made_ED[:, -1])

    def flops(self, tokens: int) -> int:
        """FLOPs of the network, once, and of the linear map."""
        E, width, size = self.out.shape
        return 2 * size * (width - 1 + E * width) + 2 * tokens * E * (width - 1)
