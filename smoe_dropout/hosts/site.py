"""A feed-forward network of a model, and the experts that replace it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.experts.compressed import CompressedExperts, sparse_units
from smoe_dropout.options import ConfigError


def is_linear(module: object) -> bool:
    """Whether the module computes exactly W x + b. False for subclasses of nn.Linear with their own forward, such as adapters."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@dataclass(frozen=True)
class Site:
    """The feed-forward network `parent.name`: up -> activation -> dropout -> down (-> final).

    up: [F, D]. down: [D, F], as in nn.Linear. gate: [F, D], with a gated activation only.
    final: module after the network inside the same child; it is kept.
    put_dropout: inserts a module as the dropout of the dense network's hidden units, and returns the module of the down map.
    put: replaces the network with a module, if that takes more than replacing one child.
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
        if self.put is not None:
            self.put(module)
            return
        whole = module if self.final is None else nn.Sequential(module, self.final)
        setattr(self.parent, self.name, whole.train(self.parent.training))

    def experts(self, config: SMoEConfig) -> Experts:
        """Experts initialised according to `config.expert_init`. ConfigError if E does not divide the width."""
        E = config.num_experts
        if config.d_expert is None and config.expert_init != "copy" and self.d_ff % E:
            raise ConfigError(
                f"the FFN width {self.d_ff} of {self.name!r} is not divisible by num_experts = {E}: choose another, or set d_expert"
            )
        d_expert = self.d_ff if config.expert_init == "copy" else config.d_expert or self.d_ff // E
        sizes = (E, self.d_model, d_expert, self.activation, self.dropout, config.backend, config.init_std)
        if config.expert_rank is None:
            experts = Experts(*sizes)
        else:
            experts = CompressedExperts(*sizes, config.expert_rank, sparse_units(d_expert, config.sparse_share))
        experts.to(self.up.device, self.up.dtype)
        if config.expert_init == "split":
            self._fill(experts, lambda rows: rows.unflatten(0, (E, -1)), 1 / E)
        if config.expert_init == "copy":
            self._fill(experts, lambda rows: rows.expand(E, *rows.shape), 1.0)
        return experts

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
