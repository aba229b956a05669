"""Concrete dropout: dropout with a learned rate (Gal, Hron and Kendall 2017, arXiv 1705.07832), on the FFN's hidden units.

z = sigmoid((log p - log(1 - p) + log u - log(1 - u)) / t), u ~ U(0, 1), t = 0.1; hidden * (1 - z) / (1 - p). With N training tokens, K
hidden units and W the map after the dropout, each layer adds a regulariser to the mean cross-entropy: l^2 / N * ||W||^2 / (1 - p) + 1 / N *
K (p log p + (1 - p) log(1 - p)); the second factor is that of the authors' code for cross-entropy. The rate starts at 0.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.hosts import find_sites
from smoe_dropout.methods.base import DENSE, Method, Objective
from smoe_dropout.options import require
from smoe_dropout.training import Reports


@dataclass(frozen=True)
class Options:
    """rate: initial rate. temperature: t of the relaxation. length_scale: l of the prior."""

    rate: float = 0.1
    temperature: float = 0.1
    length_scale: float = 0.01

    def __post_init__(self):
        require(0 < self.rate < 1, f"option rate = {self.rate} must be between 0 and 1")
        require(self.temperature > 0, f"option temperature = {self.temperature} must be positive")
        require(self.length_scale >= 0, f"option length_scale = {self.length_scale} must not be negative")


class ConcreteDropout(nn.Module, Reports):
    """[..., H] -> [..., H], without dropout in evaluation. units: H. The parameter `logit` is log p - log(1 - p)."""

    def __init__(self, options: Options, units: int):
        super().__init__()
        self.options, self.units = options, units
        self.behind: list[nn.Module] = []  # the module of the next map, in a list so that torch does not register it as a child
        self.logit = nn.Parameter(torch.logit(torch.tensor(options.rate)))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> [..., H]."""
        if not self.training:
            return hidden
        noise = torch.logit(torch.rand(hidden.shape, device=hidden.device), eps=1e-7)
        keep = torch.sigmoid(-(self.logit + noise) / self.options.temperature)
        return hidden * (keep / (1 - self.logit.sigmoid())).to(hidden.dtype)

    def regulariser(self, train_tokens: int) -> Tensor:
        """The layer's scalar regularisation term."""
        p = self.logit.sigmoid()
        negative_entropy = -(torch.special.entr(p) + torch.special.entr(1 - p))
        squares = self.behind[0].weight.square().sum() * self.options.length_scale**2 / (1 - p)
        return (squares + self.units * negative_entropy) / train_tokens

    def metrics(self) -> dict[str, float]:
        """Current dropout rate."""
        return {"rate": self.logit.sigmoid().item()}


def convert(model: nn.Module, options: Options) -> nn.Module:
    """Replace the hidden units' dropout in every feed-forward network with concrete dropout; other dropout is kept."""
    for site in find_sites(model):
        dropout = ConcreteDropout(options, site.d_ff).to(site.up.device)
        dropout.behind.append(site.put_dropout(dropout))
    return model


def objective(model, forward, settings) -> Objective:
    """Mean cross-entropy plus the layers' regularisers."""
    passed = forward()
    nll = passed.token_losses.mean()
    penalty = sum(module.regulariser(settings.train_tokens) for module in model.modules() if isinstance(module, ConcreteDropout))
    return Objective(nll + penalty, nll, passed.state)


METHOD = Method(
    name="concrete_dropout",
    title="Dense, Concrete dropout",
    source="arXiv 1705.07832; arXiv 2303.01610, Table 1",
    sparse=False,
    flags=DENSE,
    objective=objective,
    options=Options,
    convert=convert,
)
