"""Low-rank adapters of experts: W + B A in place of every map W, of which only A and B are trained (LoRA, arXiv 2106.09685).

    adapt(model, rank=8)
    ...                         # train: the optimiser keeps its state for A and B alone
    model = merged(model)       # ordinary experts again, which can be saved

The sum is formed in every pass, so that every backend and every k computes with it. Shape suffixes besides the package's: R rank, P rows of
a map (2H of a gated up).
"""

import copy

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import integer
from smoe_dropout.control import layers_or_raise, moe_layers
from smoe_dropout.experts import Experts
from smoe_dropout.options import require

MAPS = ("up", "down")


class AdaptedExperts(Experts):
    """Experts with frozen parameters, those of `experts`, and adapters of both maps: A from N(0, 1 / D), B = 0, which changes nothing."""

    def __init__(self, experts: Experts, rank: int):
        nn.Module.__init__(self)
        self.activation, self.dropout, self.backend = experts.activation, experts.dropout, experts.backend
        for name, parameter in experts.named_parameters():
            self.register_parameter(f"{name}_w" if name in MAPS else name, parameter.requires_grad_(False))
        for name in MAPS:
            E, P, D = getattr(experts, name).shape
            self.register_parameter(f"{name}_a", nn.Parameter(experts.up.new_empty(E, rank, D).normal_(0.0, D**-0.5)))
            self.register_parameter(f"{name}_b", nn.Parameter(experts.up.new_zeros(E, P, rank)))

    @property
    def up(self) -> Tensor:
        """Map with its adapter, shaped as in `Experts`."""
        return torch.baddbmm(self.up_w, self.up_b, self.up_a)

    @property
    def down(self) -> Tensor:
        """Map with its adapter, shaped as in `Experts`."""
        return torch.baddbmm(self.down_w, self.down_b, self.down_a)

    def extra_repr(self) -> str:
        """Sizes and settings, for `print(model)`."""
        return f"{super().extra_repr()}, adapter_rank={self.up_a.shape[1]}"


def adapt(model: nn.Module, rank: int = 8) -> nn.Module:
    """Freeze the experts and give their maps adapters, in place; returns the model. Build the optimiser afterwards.

    ConfigError for a model without MoE layers, or with experts that are compressed or adapted already.
    """
    rank, layers = integer("rank", rank, 1, None), layers_or_raise(model)
    require(all(type(layer.experts) is Experts for _, layer in layers), "the experts are compressed or adapted already: adapt others")
    for _, layer in layers:
        layer.experts = AdaptedExperts(layer.experts, rank).train(layer.experts.training)
    return model


def merged(model: nn.Module) -> nn.Module:
    """Model with ordinary, frozen experts that compute the same: a copy if there are adapters, else the model itself."""
    if not any(isinstance(layer.experts, AdaptedExperts) for _, layer in moe_layers(model)):
        return model
    made = copy.deepcopy(model)
    for _, layer in moe_layers(made):
        layer.experts = _merged(layer.experts)
    return made


@torch.no_grad()
def _merged(adapted: AdaptedExperts) -> Experts:
    experts = Experts.__new__(Experts)
    nn.Module.__init__(experts)
    experts.activation, experts.dropout, experts.backend = adapted.activation, adapted.dropout, adapted.backend
    for name in ("up", "bias_up", "down", "bias_down"):
        experts.register_parameter(name, nn.Parameter(getattr(adapted, name), requires_grad=False))
    return experts.train(adapted.training)
