"""The MoE layer that takes the place of a native block, and its construction from the block's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.experts.compressed import experts_of
from smoe_dropout.layer import MoELayer
from smoe_dropout.native.blocks import Parts
from smoe_dropout.options import require
from smoe_dropout.routers import Routing


class Layout(NamedTuple):
    """Form in which a block stores its experts.

    order: places in `Parts.maps` of [gate,] up and down. into_transposed: whether the maps into the hidden units are [E, D, H] rather than
    [E, H, D]. out_transposed: whether the map out of them is [E, D, H]. interleaved: whether rows of gate and up alternate in one map.
    gated: whether the activation is.
    """

    order: tuple[int, ...]
    into_transposed: bool
    out_transposed: bool
    interleaved: bool
    gated: bool
    activation: str = ""


class Tensors(NamedTuple):
    """Tensors of the experts as `Experts` stores them; without biases None."""

    up: Tensor
    bias_up: Tensor | None
    down: Tensor
    bias_down: Tensor | None


@dataclass(frozen=True)
class Options:
    """capacity: number of tokens per sequence that an expert computes; those after are dropped, their output is zero. 0: no limit."""

    capacity: int = 0

    def __post_init__(self):
        require(self.capacity >= 0, f"option capacity = {self.capacity} must be at least 0")


class AdoptedLayer(MoELayer):
    """MoE layer that keeps a native block's experts, router and shared part: y = sum_{i in top-k} g_i E_i(x) + [sigmoid(w x)] S(x).

    shared: the block's modules that are computed for every token: none, a feed-forward network, or one and the map to its gate. They keep
    their names, with an underscore behind those that a layer has already.
    """

    Options = Options

    def __init__(self, d_model: int, experts: Experts, config: SMoEConfig, shared: Mapping[str, nn.Module]):
        super().__init__(d_model, experts, config)
        self.shared_names = tuple(f"{name}_" if hasattr(self, name) else name for name in shared)
        for name, module in zip(self.shared_names, shared.values(), strict=True):
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        y = super().forward(x)
        return y + shared_output(x, [getattr(self, name) for name in self.shared_names]) if self.shared_names else y

    def route(self, x: Tensor) -> Routing:
        """x [..., T, D] -> the routing of its tokens; experts over capacity have weight 0."""
        routing = super().route(x)
        if not self.options.capacity:
            return routing
        within_NK = within_capacity(routing.indices_NK, x.shape[-2], self.num_experts, self.options.capacity)
        return routing._replace(weights_NK=routing.weights_NK * within_NK)


def shared_output(x: Tensor, modules: list) -> Tensor:
    """Output of the shared network, times its gate if there is one; `modules` are callables."""
    y = modules[0](x)
    return y if len(modules) == 1 else F.sigmoid(modules[1](x)) * y


def within_capacity(indices_NK: Tensor, positions: int, num_experts: int, capacity: int) -> Tensor:
    """Return whether an assignment is among the first `capacity` of its expert in its sequence of `positions` tokens (Switch)."""
    indices_BTK = indices_NK.unflatten(0, (-1, positions))
    places_BTK = indices_BTK + 1  # the first for index -1, fewer experts than K
    taken_BTE = torch.zeros(*indices_BTK.shape[:2], num_experts + 1, dtype=torch.int64, device=indices_NK.device).scatter(2, places_BTK, 1)
    return (taken_BTE.cumsum(1).gather(2, places_BTK) <= capacity).flatten(0, 1)


def read(parts: Parts, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensors:
    """The experts' tensors, from those of the block by name. A tensor stored as `Experts` stores it is returned itself."""
    maps = [_stacked(parts.maps[place], tensors) for place in layout.order]
    into = [rows.transpose(1, 2) if layout.into_transposed else rows for rows in maps[:-1]]
    down = maps[-1].transpose(1, 2) if layout.out_transposed else maps[-1]
    biases = [_stacked(parts.biases[place], tensors) for place in layout.order] if parts.biases else []
    up, bias_up = (None if not rows else rows[0] if len(rows) == 1 else torch.cat(rows, 1) for rows in (into, biases[:-1]))
    if layout.interleaved:
        up, bias_up = (None if rows is None else torch.cat([rows[:, ::2], rows[:, 1::2]], 1) for rows in (up, bias_up))
    return Tensors(up, bias_up, down, biases[-1] if biases else None)


def _stacked(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[names[0]] if len(names) == 1 else torch.stack([tensors[name] for name in names])


@torch.no_grad()
def adopted(block: nn.Module, parts: Parts, layout: Layout, dropout: float, config: SMoEConfig) -> AdoptedLayer:
    """The layer that replaces the block, with its tensors if `config` has the block's sizes, and fresh ones of its own sizes otherwise.

    Biases that the block does not have are zero and not trained.
    """
    tensors = dict(block.named_parameters()) | dict(block.named_buffers())
    weight = tensors[parts.router]
    own = read(parts, layout, tensors)
    E, H, D = own.down.shape
    same = config.num_experts == E and config.d_expert in (None, H) and config.expert_rank is None
    with torch.device("meta" if same else own.up.device):
        experts = experts_of(config, D, config.d_expert or H, layout.activation, dropout)
    trained = any(tensors[name].requires_grad for name in (*parts.maps[0], *parts.maps[-1]))
    if same:
        for name, tensor in own._asdict().items():
            if tensor is None:
                tensor = torch.zeros(getattr(experts, name).shape, dtype=own.up.dtype, device=own.up.device)
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor.contiguous(), trained)
            setattr(experts, name, tensor)
    else:
        experts.to(own.up.dtype).requires_grad_(trained)
    if not parts.biases:
        experts.bias_up.requires_grad_(False)
        experts.bias_down.requires_grad_(False)
    shared = {name: block.get_submodule(name) for name in parts.shared}
    layer = AdoptedLayer(D, experts, config, shared)
    router = layer.router
    if config.num_experts == E:
        kind = router.weight.dtype
        router.weight = nn.Parameter(weight.detach().to(kind), weight.requires_grad)
        for name, vector in zip(roles(layer), parts.vectors, strict=True):
            values = tensors[vector].detach().to(kind).flatten()
            setattr(router, name, nn.Parameter(values, weight.requires_grad) if name == "bias" else values)
    if router.freeze:
        router.requires_grad_(False)
    return layer.train(block.training)


def roles(layer: MoELayer) -> list[str]:
    """Names of the router's values per expert, in the order of `Parts.vectors`: parameters, then buffers."""
    return [name for name in ("bias", "correction") if getattr(layer.router, name) is not None]
