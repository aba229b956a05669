"""Greedy generation byte by byte with a full memory: `logits`, which projects the memory again for every byte, and `read`, which
keeps keys and values, also with experts in 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Precision, autocast, compare
from benchmarks.model import DENSE, OURS, ModelFlags, contestants, random_batches
from mem_transformer import MemTransformerLM
from smoe_dropout import slim
from utils.models.flops import active_parameters

CACHED, UNCACHED = "cached", "uncached"
INT8 = f"ours, int8 experts, {CACHED}"
BASELINE = f"{DENSE}, {CACHED}"


@dataclass(frozen=True)
class GenerationFlags(ModelFlags):
    """Time of generating bytes over that of the dense model of equal parameters with a cache."""

    batch_size: int = 1
    """lanes"""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, bf16 or both"""
    k: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    """numbers of active experts"""
    tokens: int = 32
    """bytes generated per round"""


def generator(model: MemTransformerLM, flags: GenerationFlags, precision: Precision, way: str) -> Callable[[], Tensor]:
    """Returns a function that continues generating and returns the bytes [batch_size, tokens], starting with a full memory."""
    model.eval()
    read = model.read if way == CACHED else model.logits
    with torch.no_grad(), autocast(precision, flags.device):
        logits_BTV, state = read(next(random_batches(flags, flags.tgt_len)), None)
    last_B1 = logits_BTV[:, -1:].argmax(-1)

    @torch.no_grad()
    def generate() -> Tensor:
        nonlocal last_B1, state
        found = []
        for _ in range(flags.tokens):
            with autocast(precision, flags.device):
                logits_BTV, state = read(last_B1, state)
            last_B1 = logits_BTV[:, -1:].argmax(-1)
            found.append(last_B1)
        return torch.cat(found, 1)

    return generate


def measure_row(flags: GenerationFlags, precision: Precision, k: int) -> dict[str, Any]:
    """Measures experts and dense, with and without a cache. bound: weights read per byte, relative to the dense model.

    mib_read: of weights, and of keys and values with the cache. mib: of all weights, by contestant.
    """
    models = {name: model for name, model in contestants(flags, k).items() if name in (OURS, DENSE)}
    calls = {f"{name}, {way}": generator(model, flags, precision, way) for name, model in models.items() for way in (UNCACHED, CACHED)}
    int8 = slim(models[OURS], k, torch.int8)
    calls[INT8] = generator(int8, flags, precision, CACHED)
    active = active_parameters(models[OURS], k)[0]
    keys = 3 * flags.n_layer * (flags.tgt_len + 1) * flags.n_head * flags.d_head  # of positions and of distances, and values
    row = {"precision": precision, "k": k, "bound": round(active / active_parameters(models[DENSE], None)[0], 4)}
    row["mib_read"] = {"weights": round(active / 2**18, 4), "keys and values": round(keys / 2**18, 4)}
    row["mib"] = {OURS: mib(models[OURS]), INT8: mib(int8)}
    return row | {"results": compare(calls, flags, BASELINE)}


def mib(model: MemTransformerLM) -> float:
    """Size of all weights in MiB."""
    return round(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20, 1)


def rows(flags: GenerationFlags) -> list[dict[str, Any]]:
    """A row for each precision and k."""
    return [measure_row(flags, precision, k) for precision in flags.precision for k in flags.k]
