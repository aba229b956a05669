"""Which backend `auto` takes. A pure function of the sizes, so that equal runs choose equally."""

import torch

# Multiply-adds of one expert's matrix product. At 134e6 gathering tokens paid off up to k/E of about 0.9, at 8e6 to 13e6 up to about
# 0.7 (records in results/benchmarks, one thread); the limit between them is a round number, not a measured crossover
LARGE_PRODUCT = 60e6
SPARSE_UP_TO_LARGE, SPARSE_UP_TO_SMALL = 0.9, 0.7


FEW = 8  # tokens in inference whose experts are not worth sorting for


def choose_backend(
    tokens: int, k: int, num_experts: int, d_expert: int, d_model: int, dtype: torch.dtype, device: str, training: bool = True
) -> str:
    """The backend's name: "sorted" where few experts are active and each has work enough to gather for, else "masked"; on CUDA in bf16
    "grouped" for few. "few" for a few tokens on a CPU that need no gradient (`training` False).
    """
    share = k / num_experts
    if device == "cpu" and not training and tokens <= FEW:
        return "few"
    if device == "cuda" and dtype == torch.bfloat16 and share <= 0.7 and d_expert % 8 == d_model % 8 == 0:
        return "grouped"
    product = tokens * share * d_expert * d_model
    return "sorted" if share <= (SPARSE_UP_TO_LARGE if product >= LARGE_PRODUCT else SPARSE_UP_TO_SMALL) else "masked"
