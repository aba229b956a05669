"""An evaluation pass of Transformer-XL, a batch with memory and without gradients, at every k; ours caches keys and values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import Precision, autocast, compare
from benchmarks.model import DENSE, OFFICIAL, ModelFlags, contestants, least_ratio, random_batches
from mem_transformer import MemTransformerLM

BASELINE = DENSE


@dataclass(frozen=True)
class EvaluationFlags(ModelFlags):
    """Time of an evaluation pass over that of the dense model of equal parameters."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    k: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    """numbers of active experts"""


def evaluation_pass(model: MemTransformerLM, flags: EvaluationFlags, precision: Precision, way: str, seed: int = 1) -> Callable[[], float]:
    """Returns a function that reads one segment and returns its mean loss. It has run once, so that the memory is filled."""
    batches, memory = random_batches(flags, flags.tgt_len + 1, seed), None
    model.eval()
    logits = model.logits if way == OFFICIAL else model.read

    @torch.no_grad()
    def evaluate() -> float:
        nonlocal memory
        batch = next(batches)
        with autocast(precision, flags.device):
            logits_BTV, memory = logits(batch[:, :-1], memory)
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch[:, 1:].flatten()).item()

    evaluate()
    return evaluate


def measure_row(flags: EvaluationFlags, precision: Precision, k: int) -> dict[str, Any]:
    """Measures all contestants at one k in one precision."""
    models = contestants(flags, k)
    passes = {name: evaluation_pass(model, flags, precision, name, seed) for seed, (name, model) in enumerate(models.items())}
    results = compare(passes, flags, BASELINE)
    return {"precision": precision, "k": k, "bound": least_ratio(models, flags), "results": results}


def rows(flags: EvaluationFlags) -> list[dict[str, Any]]:
    """A row for each precision and k."""
    return [measure_row(flags, precision, k) for precision in flags.precision for k in flags.k]
