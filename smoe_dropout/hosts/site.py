"""One feed-forward network of a host model, and the experts it becomes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.config import ConfigError, SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.experts.compressed import CompressedExperts, sparse_units


def is_linear(module: object) -> bool:
    """Whether it computes W x + b and nothing else: a subclass with a forward of its own, such as one with adapters, does more."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@dataclass(frozen=True)
class Site:
    """`parent.name` is the feed-forward network up -> activation -> dropout -> down (-> final). up [F, D], down [D, F] as in nn.Linear; a
    gated activation has a `gate` [F, D] besides.
    """

    parent: nn.Module
    name: str
    up: Tensor
    bias_up: Tensor | None
    down: Tensor
    bias_down: Tensor | None
    activation: str
    dropout: float
    final: nn.Module | None = None  # what of the host follows the network inside the same child, and stays
    # makes a module the dropout of the dense network's hidden units, and returns the module of the map behind it
    put_dropout: Callable[[nn.Module], nn.Module] | None = None
    gate: Tensor | None = None
    bias_gate: Tensor | None = None
    put: Callable[[nn.Module], None] | None = None  # makes a module the network, where that is more than one child

    @property
    def d_model(self) -> int:
        return self.up.shape[1]

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    def replace(self, module: nn.Module) -> None:
        if self.put is not None:
            self.put(module)
            return
        whole = module if self.final is None else nn.Sequential(module, self.final)
        setattr(self.parent, self.name, whole.train(self.parent.training))

    def experts(self, config: SMoEConfig) -> Experts:
        """Experts initialised as `config.expert_init` says. ConfigError if E does not divide the width that is to be divided."""
        E = config.num_experts
        if config.d_expert is None and config.expert_init != "copy" and self.d_ff % E:
            raise ConfigError(
                f"the FFN width {self.d_ff} of {self.name!r} is not divisible by num_experts = {E}: choose another, or give d_expert"
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
        """Every expert gets its rows of the dense maps as `dealt`, [F, ...] -> [E, H, ...], and `bias_share` of the output bias, so that
        all of them together have it once.
        """
        maps = [self.up] if self.gate is None else [self.gate, self.up]
        biases = [self.bias_up] if self.gate is None else [self.bias_gate, self.bias_up]
        experts.up.copy_(torch.cat([dealt(rows) for rows in maps], 1))
        experts.down.copy_(dealt(self.down.t()))
        zeros = self.up.new_zeros(self.d_ff)
        experts.bias_up.copy_(torch.cat([dealt(zeros if bias is None else bias) for bias in biases], 1))
        if self.bias_down is not None:
            experts.bias_down.copy_(self.bias_down * bias_share)
