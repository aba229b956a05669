"""Which backend `auto` takes. A pure function of the sizes, so that equal runs choose equally; says each choice once, to the log.

On a CPU gathering tokens for each expert (`sorted`) is faster than computing all experts (`masked`) up to some share k/E of them, which
depends on the sizes: calibration.json holds that share as it was measured, and `python -m benchmarks calibrate` measures it anew.
"""

import functools
import json
import logging
import math
from pathlib import Path

import torch

CALIBRATION = Path(__file__).with_name("calibration.json")
FEW = 8  # tokens in inference whose experts are not worth sorting for
SPARSE_ON_CUDA = 0.7  # share of active experts up to which a product for each expert is taken there: an estimate, not measured


def choose_backend(
    tokens: int, k: int, num_experts: int, d_expert: int, d_model: int, dtype: torch.dtype, device: str, training: bool = True
) -> str:
    """The backend's name: "sorted" where so few experts are active that gathering tokens for each pays off, else "masked"; on CUDA in bf16
    "grouped" for few. "few" for a few tokens on a CPU that need no gradient (`training` False).
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
    _say(chosen, k, num_experts)
    return chosen


@functools.lru_cache(maxsize=4096)
def sorted_up_to(tokens: int, d_expert: int, d_model: int, dtype: torch.dtype, training: bool) -> float:
    """The share of active experts up to which `sorted` was the faster one, at the calibrated sizes nearest to these."""
    precision = "bf16" if dtype in (torch.bfloat16, torch.float16) else "fp32"
    sizes = {"tokens": max(tokens, 1), "d_expert": d_expert, "d_model": d_model}
    rows = [row for row in _table() if row["precision"] == precision and row["training"] == training]
    return min(rows, key=lambda row: sum(abs(math.log(row[name] / size)) for name, size in sizes.items()))["sorted_up_to"]


@functools.cache
def _table() -> list[dict]:
    return json.loads(CALIBRATION.read_text())["rows"]


@functools.cache
def _say(chosen: str, k: int, num_experts: int) -> None:
    logging.getLogger(__name__).info("experts backend 'auto' takes %r at k = %d of %d", chosen, k, num_experts)
