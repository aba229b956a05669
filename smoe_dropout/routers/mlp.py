"""Routing by a small network that predicts which experts are strong (MoEfication, arXiv 2110.01786, section 3.3, "MLP selection")."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.options import require
from smoe_dropout.precision import without_autocast
from smoe_dropout.regression import log_strength
from smoe_dropout.routers import LogitRouter
from smoe_dropout.single_position import product

STEPS, BATCH, LEARNING_RATE = 600, 512, 5e-3  # of `fit`


@dataclass(frozen=True)
class Options:
    """router_width: hidden units of the router."""

    router_width: int = 64

    def __post_init__(self):
        require(self.router_width >= 1, f"option router_width = {self.router_width} must be at least 1")


class MLPRouter(LogitRouter):
    """h(x) = W tanh(V x + c) + b. V [P, D] and W [E, P] ~ N(0, init_std^2), c = b = 0."""

    Options = Options
    balance_by_default = 0.01

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        self.hidden, self.out = nn.Linear(d_model, self.options.router_width), nn.Linear(self.options.router_width, config.num_experts)
        for part in (self.hidden, self.out):
            nn.init.normal_(part.weight, 0.0, config.init_std)
            nn.init.zeros_(part.bias)
        self.requires_grad_(not self.freeze)

    @property
    def last(self) -> nn.Module:
        """The map whose rows are the experts'."""
        return self.out

    def logits(self, x_ND: Tensor) -> Tensor:
        """x [..., D] -> logits [..., E]."""
        dtype = torch.promote_types(self.out.weight.dtype, torch.float32)
        with without_autocast(x_ND.device.type):
            hidden_NP = product(x_ND.to(dtype), self.hidden.weight.to(dtype), self.hidden.bias.to(dtype)).tanh()
            return product(hidden_NP, self.out.weight.to(dtype), self.out.bias.to(dtype))

    @torch.enable_grad()
    def fit(self, inputs_TD: Tensor, strength_TE: Tensor, experts: Experts) -> None:
        """Train the router by least squares on the logarithm of the strengths, for seconds. Draws from torch's default generator."""
        targets_TE, scale = log_strength(strength_TE), inputs_TD.std().clamp(min=1e-30)
        mean_E, deviation = targets_TE.mean(0), targets_TE.std().clamp(min=1e-30)
        trained = nn.Sequential(
            nn.Linear(inputs_TD.shape[1], self.options.router_width), nn.Tanh(), nn.Linear(self.options.router_width, self.num_experts)
        )
        trained.to(inputs_TD.device)
        optimizer = torch.optim.Adam(trained.parameters(), LEARNING_RATE)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(inputs_TD), (min(BATCH, len(inputs_TD)),)).to(inputs_TD.device)
            loss = F.mse_loss(trained(inputs_TD[batch] / scale), (targets_TE[batch] - mean_E) / deviation)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pace.step()
        with torch.no_grad():
            self.hidden.weight.copy_(trained[0].weight / scale)
            self.hidden.bias.copy_(trained[0].bias)
            self.out.weight.copy_(trained[2].weight * deviation)
            self.out.bias.copy_(trained[2].bias * deviation + mean_E)

    def flops(self, tokens: int) -> int:
        """FLOPs of both linear maps."""
        return 2 * tokens * (self.hidden.weight.numel() + self.out.weight.numel())
