"""Selection of the backend for `auto`: a pure function of the sizes, so that identical runs choose identically. Each choice is logged once.

On a CPU gathering tokens for each expert (`sorted`) beats computing all experts (`masked`) up to some fraction k/E of active experts that
depends on the sizes. backend_table.json holds the measured fractions; `python -m benchmarks backends` measures them again.
"""

import functools
import json
import logging
import math
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("backend_table.json")
FEW = 8  # most tokens in inference for which sorting does not pay off
SPARSE_ON_CUDA = 0.7  # fraction of active experts up to which one product per expert is used on CUDA: an estimate, not measured


def choose_backend(
    tokens: int, k: int, num_experts: int, d_expert: int, d_model: int, dtype: torch.dtype, device: str, training: bool = True
) -> str:
    """Name of the fastest backend for these sizes.

    On a CPU: "few" for up to `FEW` tokens without gradients, "sorted" up to the measured fraction of active experts, "masked" above it. On
    CUDA: "grouped" for few active experts in bf16, "sorted" in other precisions, "masked" for many.
    """
    share = k / num_experts
    if device == "cpu" and not training and tokens <= FEW:
        chosen = "few"
    elif device == "cpu":
        chosen = "sorted" if share <= sorted_up_to(tokens, d_expert, d_model, dtype, training) else "masked"
    elif share > SPARSE_ON_CUDA:
        chosen = "masked"
    else:
        chosen = "grouped" if dtype == torch.bfloat16 and d_expert % 8 == d_model % 8 == 0 else "sorted"
    _log(chosen, k, num_experts)
    return chosen


@functools.lru_cache(maxsize=4096)
def sorted_up_to(tokens: int, d_expert: int, d_model: int, dtype: torch.dtype, training: bool) -> float:
    """Fraction of active experts up to which `sorted` was the faster backend, at the measured sizes nearest to these."""
    precision = "bf16" if dtype in (torch.bfloat16, torch.float16) else "fp32"
    sizes = {"tokens": max(tokens, 1), "d_expert": d_expert, "d_model": d_model}
    rows = [row for row in _table() if row["precision"] == precision and row["training"] == training]
    return min(rows, key=lambda row: sum(abs(math.log(row[name] / size)) for name, size in sizes.items()))["sorted_up_to"]


@functools.cache
def _table() -> list[dict]:
    return json.loads(TABLE.read_text())["rows"]


@functools.cache
def _log(chosen: str, k: int, num_experts: int) -> None:
    logging.getLogger(__name__).info("experts backend 'auto' selects %r at k = %d of %d", chosen, k, num_experts)
