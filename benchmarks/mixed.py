"""The expert layer on a batch whose rows have different k, over the same batch at the largest of them; and by a gate mass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer import LayerFlags, forward_backward, moe_layer
from benchmarks.measure import Common, Precision, autocast, compare
from smoe_dropout import MoELayer, mean_k, top_k, top_p

BASELINE, MIXED, MEAN = "all rows at the largest k", "each row at its k", "all rows at the mean k"
SEPARATE, MASS = "a pass for each k", "gate mass of this mean"


@dataclass(frozen=True)
class MixedFlags(Common):
    """Time of one expert layer on rows that have different k, over the time of all at the largest k."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    k: tuple[int, ...] = (1, 4, 4, 8, 8)
    """numbers of active experts of the rows, in turn; their mean is a whole number"""
    rows: int = 20
    """sequences per batch"""
    tgt_len: int = 128
    """positions per sequence"""
    num_experts: int = 16
    """experts"""
    d_model: int = 256
    """width of the model"""
    d_expert: int = 512
    """hidden width of an expert"""
    router_std: float = 0.1
    """standard deviation of the router's weights, by which the number of experts that reach a gate mass varies between tokens"""


def k_of_rows(flags: MixedFlags) -> Tensor:
    """The k of each row [B]."""
    return torch.tensor(flags.k).repeat(-(-flags.rows // len(flags.k)))[: flags.rows]


def contestants(flags: MixedFlags, layer: MoELayer, p: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to compute the layer for a batch [B, T, D]."""
    k_B = k_of_rows(flags)
    parts = [((k_B == k).nonzero()[:, 0].to(flags.device), k) for k in k_B.unique().tolist()]
    order_B = torch.cat([rows for rows, _ in parts]).argsort()

    def within(selected: Callable[[], AbstractContextManager], x_BTD: Tensor) -> Tensor:
        with selected():
            return layer(x_BTD)

    def separately(x_BTD: Tensor) -> Tensor:
        return torch.cat([within(partial(top_k, layer, k), x_BTD[rows]) for rows, k in parts])[order_B]

    selections = {
        MIXED: partial(top_k, layer, k_B),
        BASELINE: partial(top_k, layer, max(flags.k)),
        MEAN: partial(top_k, layer, sum(flags.k) // len(flags.k)),
        MASS: partial(top_p, layer, p),
    }
    return {name: partial(within, selected) for name, selected in selections.items()} | {SEPARATE: separately}


@torch.no_grad()
def mass_of(layer: MoELayer, x_BTD: Tensor, k: float) -> tuple[float, float]:
    """The gate mass that takes k experts per token in the mean, found by bisection, and the mean that it takes."""
    low, high = 0.0, 1.0
    for _ in range(20):
        p = (low + high) / 2
        with top_p(layer, p):
            layer(x_BTD)
        taken = next(iter(mean_k(layer).values()))
        low, high = (p, high) if taken < k else (low, p)
    return p, taken


def measure_row(flags: MixedFlags, precision: Precision, training: bool) -> dict[str, Any]:
    """Measures all ways in one precision, forward or with backward. bound: the mean k over the largest."""
    sizes = LayerFlags(num_experts=flags.num_experts, d_model=flags.d_model, d_expert=flags.d_expert)
    layer = moe_layer(sizes, max(flags.k)).to(flags.device)
    torch.nn.init.normal_(layer.router.weight, 0.0, flags.router_std)
    size, mean = (flags.rows, flags.tgt_len, flags.d_model), sum(flags.k) / len(flags.k)
    grad_BTD = torch.randn(size, device=flags.device)
    p, taken = mass_of(layer, torch.randn(size, device=flags.device), mean)

    def call(way: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        # new tokens in every round and for every contestant, as in `layer`
        batches = iter([torch.randn(size, device=flags.device, requires_grad=training) for _ in range(flags.rounds + 2)])

        def run() -> Any:
            if training:
                return forward_backward(Way(layer, way), next(batches), grad_BTD, precision)
            with torch.no_grad(), autocast(precision, flags.device):
                return way(next(batches))

        return run

    calls = {name: call(way) for name, way in contestants(flags, layer, p).items()}
    chosen = {"precision": precision, "training": training, "bound": mean / max(flags.k), "p": round(p, 4), "mean_k": round(taken, 3)}
    return {**chosen, "results": compare(calls, flags, BASELINE)}


class Way(torch.nn.Module):
    """The layer, computed in one of the ways."""

    def __init__(self, layer: MoELayer, way: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.way(x_BTD)


def rows(flags: MixedFlags) -> list[dict[str, Any]]:
    """A row for each precision, forward alone and with backward."""
    return [measure_row(flags, precision, training) for precision in flags.precision for training in (False, True)]
