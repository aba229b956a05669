"""Measures the table that the backend `auto` uses: the fraction of active experts up to which `sorted` beats `masked`, by size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import layer
from benchmarks.measure import Common, Precision, autocast, environment, interleave, summarise
from smoe_dropout.experts.choice import TABLE
from utils import documents

BASELINE = "masked"
# tokens, d_model and d_expert of the layers measured: small models, the paper's, and BERT-base's
SIZES = (
    *((tokens, 128, d_expert) for d_expert in (16, 64, 256) for tokens in (128, 512, 2048, 8192)),
    *((tokens, 256, d_expert) for d_expert in (128, 512) for tokens in (128, 512, 2048, 8192)),
    *((tokens, 768, d_expert) for d_expert in (96, 384) for tokens in (128, 512, 2048)),
)


@dataclass(frozen=True)
class BackendFlags(Common):
    """Measure up to which fraction of active experts `sorted` is faster than `masked`; takes several minutes."""

    rounds: int = 5
    """measured rounds, after one warm-up round"""
    out: Path = TABLE
    """output file; default: the package's own table"""
    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    num_experts: int = 16
    """number of experts"""
    k: tuple[int, ...] = (1, 2, 4, 8, 10, 12, 14, 16)
    """numbers of active experts"""
    sizes: tuple[tuple[int, int, int], ...] = SIZES
    """tokens, d_model, d_expert"""


def _pass(module: nn.Module, tokens: int, d_model: int, precision: Precision, training: bool) -> Callable[[], Any]:
    """Returns a function that runs a forward pass over new tokens, and in training a backward pass."""
    grad_ND, draw = torch.randn(tokens, d_model), torch.Generator().manual_seed(0)

    def call() -> Any:
        x_ND = torch.randn(tokens, d_model, generator=draw).requires_grad_(training)
        if training:
            return layer.forward_backward(module, x_ND, grad_ND, precision)
        with torch.no_grad(), autocast(precision):
            return module(x_ND)

    return call


def measure_row(flags: BackendFlags, size: tuple[int, int, int], precision: Precision, training: bool) -> dict[str, Any]:
    """Time of `sorted` over that of `masked` at every k, and the fraction of experts up to which using it minimises the total time."""
    tokens, d_model, d_expert = size
    sizes = layer.LayerFlags(tokens=tokens, d_model=d_model, d_expert=d_expert, num_experts=flags.num_experts)
    ways = {BASELINE: layer.contestant(layer.moe_layer(sizes, flags.num_experts), "ours: masked")}  # its time does not depend on k
    ways |= {str(k): layer.contestant(layer.moe_layer(sizes, k), "ours: sorted") for k in flags.k}
    calls = {name: _pass(module, tokens, d_model, precision, training) for name, module in ways.items()}
    found = summarise(interleave(calls, flags.rounds), BASELINE)
    ratios = {str(k): round(found[str(k)]["ratio"], 3) for k in flags.k}
    most = min((0, *flags.k), key=lambda most: sum(ratios[str(k)] if k <= most else 1 for k in flags.k))
    measured = {"precision": precision, "training": training, "tokens": tokens, "d_model": d_model, "d_expert": d_expert}
    return {**measured, "sorted_up_to": most / flags.num_experts, "time_over_masked_by_k": ratios}


def measure_table(flags: BackendFlags, tuned: list[str]) -> None:
    """Measure and write the table, printing each row."""
    rows = []
    for precision in flags.precision:
        for training in (True, False):
            for size in flags.sizes:
                rows.append(row := measure_row(flags, size, precision, training))
                case = f"{row['tokens']:,} tokens, {row['d_model']} -> {row['d_expert']}, {'training' if training else 'inference'}"
                print(f"{precision}, {case}: sorted up to k/E = {row['sorted_up_to']:g}", flush=True)
    sizes = {"num_experts": flags.num_experts, "rounds": flags.rounds, "k": flags.k}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    documents.write(flags.out, {"sizes": sizes, "environment": environment(flags.device, tuned), "rows": rows})
