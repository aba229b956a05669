"""Inverted dropout for hand-written backward passes, from random bytes.

One byte decides each value, so that one 64-bit random word serves eight of them, which is several times cheaper than a uniform number each.
The probability is therefore quantised to multiples of 1/256 (0.1 becomes 26/256 = 0.1016), and kept values are scaled by the inverse of
the quantised keep probability, so the expectation is exact.
"""

import torch
from torch import Tensor


def quantised(p: float) -> float:
    """The probability used for p: the nearest multiple of 1/256, but never 0 or 1 for 0 < p < 1."""
    return min(max(round(p * 256), 1), 255) / 256 if 0 < p < 1 else p


def kept_scale(p: float) -> float:
    """Factor applied to kept values; 0 if none are kept."""
    return 1 / (1 - quantised(p)) if p < 1 else 0.0


def keep_mask(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Bool tensor, False with probability `quantised(p)`, drawn from the device's default generator."""
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None)  # the full 64-bit range, so that every byte is uniform
    return words.view(torch.uint8)[:count].view(shape) >= round(quantised(p) * 256)
