"""A feed-forward network of a model, and the experts that replace it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.cuts import Neurons, arranged
from smoe_dropout.experts import Experts
from smoe_dropout.experts.compressed import experts_of
from smoe_dropout.options import ConfigError


class ChannelsFirst(nn.Sequential):
    """A module of the last dimension, applied to dimension 1: [B, D, ...] -> [B, D, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D, ...] -> [B, D, ...]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Site:
    """The feed-forward network `parent.name`: up -> activation -> dropout -> down (-> final).

    up: [F, D]. down: [D, F], as in nn.Linear. gate: [F, D], with a gated activation only.
    final: module after the network inside the same child; it is kept.
    put_dropout: inserts a module as the dropout of the dense network's hidden units, and returns the module of the down map.
    put: replaces the network with a module, if that takes more than replacing one child.
    path: dotted name of `parent.name` in the model. channels_first: whether the network acts on dimension 1, as convolutions do.
    places: every (parent, name) of a network that the model has in several places; they get the same module.
    """

    parent: nn.Module
    name: str
    up: Tensor
    bias_up: Tensor | None
    down: Tensor
    bias_down: Tensor | None
    activation: str
    dropout: float
    final: nn.Module | None = None
    put_dropout: Callable[[nn.Module], nn.Module] | None = None
    gate: Tensor | None = None
    bias_gate: Tensor | None = None
    put: Callable[[nn.Module], None] | None = None
    path: str = ""
    channels_first: bool = False
    places: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def d_model(self) -> int:
        """Width of the model."""
        return self.up.shape[1]

    @property
    def d_ff(self) -> int:
        """Hidden width of the network."""
        return self.up.shape[0]

    def replace(self, module: nn.Module) -> None:
        """Replace the network with `module`."""
        inner = ChannelsFirst(module) if self.channels_first else module
        if self.put is not None:
            self.put(inner)
            return
        whole = inner if self.final is None else nn.Sequential(inner, self.final)
        for parent, name in self.places or ((self.parent, self.name),):
            setattr(parent, name, whole.train(parent.training))

    def experts(self, config: SMoEConfig) -> Experts:
        """Experts initialised according to `config.expert_init`. ConfigError if E does not divide the width."""
        E = config.num_experts
        if config.d_expert is None and config.expert_init != "copy" and self.d_ff % E:
            raise ConfigError(
                f"the FFN width {self.d_ff} of {self.path or self.name!r} is not divisible by num_experts = {E}: choose another, or set "
                "d_expert"
            )
        d_expert = self.d_ff if config.expert_init == "copy" else config.d_expert or self.d_ff // E
        with torch.device("meta") if self.up.is_meta else nullcontext():  # a large model without weights draws none
            experts = experts_of(config, self.d_model, d_expert, self.activation, self.dropout)
        experts.to(self.up.device, self.up.dtype)
        if config.expert_init == "split":
            order_F = None if (config.cut == "contiguous" and not config.shared_experts) or self.up.is_meta else self._order(config)
            self._fill(experts, lambda rows: (rows if order_F is None else rows[order_F]).unflatten(0, (E, -1)), 1 / E)
        if config.expert_init == "copy":
            self._fill(experts, lambda rows: rows.expand(E, *rows.shape), 1.0)
        return experts

    @torch.no_grad()
    def _order(self, config: SMoEConfig) -> Tensor:
        """The order in which the hidden neurons are dealt to experts [F]. A neuron's importance is the product of its weights' norms."""
        maps = [self.up, self.down.t(), *([] if self.gate is None else [self.gate])]
        importance_F = torch.stack([rows.float().norm(dim=1) for rows in maps]).prod(0)
        neurons = Neurons(self.up if self.gate is None else self.gate, importance_F)
        return arranged(config.cut, neurons, config.num_experts, config.shared_experts, torch.default_generator)

    @torch.no_grad()
    def _fill(self, experts: Experts, dealt: Callable[[Tensor], Tensor], bias_share: float) -> None:
        """Copy the dense weights into the experts.

        dealt: assigns rows of the dense maps to experts, [F, ...] -> [E, H, ...]. bias_share: each expert's fraction of the output bias.
        """
        maps = [self.up] if self.gate is None else [self.gate, self.up]
        biases = [self.bias_up] if self.gate is None else [self.bias_gate, self.bias_up]
        experts.up.copy_(torch.cat([dealt(rows) for rows in maps], 1))
        experts.down.copy_(dealt(self.down.t()))
        zeros = self.up.new_zeros(self.d_ff)
        experts.bias_up.copy_(torch.cat([dealt(zeros if bias is None else bias) for bias in biases], 1))
        if self.bias_down is not None:
            experts.bias_down.copy_(self.bias_down * bias_share)
