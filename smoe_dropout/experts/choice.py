"""Which backend `auto` takes. A pure function of the sizes, so that equal runs choose equally."""

import torch

# multiply-adds of one expert's matrix product above which gathering tokens pays off at k/E of 0.9, measured on a 2-core AVX-512 CPU
LARGE_PRODUCT = 60e6
SPARSE_UP_TO_LARGE, SPARSE_UP_TO_SMALL = 0.9, 0.25


def choose_backend(tokens: int, k: int, num_experts: int, d_expert: int, d_model: int, dtype: torch.dtype, device: str) -> str:
    """ "sorted" where few experts are active and each has enough work to gather for, else "masked"; "grouped" for bf16 on CUDA."""
    share = k / num_experts
    if device == "cuda" and dtype == torch.bfloat16 and share <= 0.7 and d_expert % 8 == d_model % 8 == 0:
        return "grouped"
    product = tokens * share * d_expert * d_model
    return "sorted" if share <= (SPARSE_UP_TO_LARGE if product >= LARGE_PRODUCT else SPARSE_UP_TO_SMALL) else "masked"
