"""Inverted dropout for hand-written backward passes, from random bytes.

A byte decides a value, so that one draw of a 64-bit word serves eight of them: several times cheaper than one uniform number each. The
probability is therefore quantised to 1/256 (0.1 becomes 26/256 = 0.1016), and kept values are scaled by the inverse of the quantised
probability, so the expectation is exact.
"""

import torch
from torch import Tensor


def quantised(p: float) -> float:
    """The probability used for p: the nearest multiple of 1/256, for 0 < p < 1 never 0 and never 1."""
    return min(max(round(p * 256), 1), 255) / 256 if 0 < p < 1 else p


def kept_scale(p: float) -> float:
    """What kept values are multiplied by; 0 where none is kept."""
    return 1 / (1 - quantised(p)) if p < 1 else 0.0


def keep_mask(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """A bool tensor, False with probability `quantised(p)`, drawn from the default generator of the device."""
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None)  # the whole range of 64 bits: every byte is uniform
    return words.view(torch.uint8)[:count].view(shape) >= round(quantised(p) * 256)
