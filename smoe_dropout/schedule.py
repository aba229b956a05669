"""k as a pure function of the training step: the seven modes of the official code, and a constant."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from smoe_dropout.registry import unknown

_DOUBLING = (1, 2, 4, 8, 16)


def _exponential(step: int, total: int) -> float:
    # 300 equal stretches, as in the official code, which divides by zero below 300 steps
    stretch = step // (total // 300) if total >= 300 else 300 * step // total
    return 0.99**stretch


def _doubling(step: int, total: int) -> int:
    return min(int(len(_DOUBLING) * step / total), len(_DOUBLING) - 1)


# (step t, total T, k_min, k_max) -> k before clipping; Python's rounding, half to even, as in the official code
SCHEDULES: dict[str, Callable[[int, int, int, int], int]] = {
    "linear_increase": lambda t, T, low, high: round((high - low) * t / T) + low,
    "linear_decrease": lambda t, T, low, high: round(-(high - low) * t / T) + high,
    "cosine_decrease": lambda t, T, low, high: round((high - low) * math.cos(math.pi * t / (2 * T))) + low,
    "cosine_increase": lambda t, T, low, high: round(-(high - low) * math.cos(math.pi * t / (2 * T))) + high,
    "exp_increase": lambda t, T, low, high: round(-(high - low) * _exponential(t, T)) + high,
    "multi_step_increase": lambda t, T, low, high: _DOUBLING[_doubling(t, T)],
    "multi_step_decrease": lambda t, T, low, high: _DOUBLING[::-1][_doubling(t, T)],
    "constant": lambda t, T, low, high: high,
}


@dataclass(frozen=True)
class TopKSchedule:
    """k(step), within k_min..k_max; steps past `total_steps` keep the last value. Paper section 3.2: linear from E/2 to E.

    Raises ValueError for an unknown mode, k_min > k_max, k_min < 1 or total_steps < 1.
    """

    mode: str
    k_min: int
    k_max: int
    total_steps: int

    def __post_init__(self):
        if self.mode not in SCHEDULES:
            raise ValueError(unknown("schedule", self.mode, SCHEDULES))
        if not 1 <= self.k_min <= self.k_max:
            raise ValueError(f"k_min = {self.k_min} and k_max = {self.k_max} must satisfy 1 <= k_min <= k_max")
        if self.total_steps < 1:
            raise ValueError(f"total_steps = {self.total_steps} must be at least 1")

    def __call__(self, step: int) -> int:
        k = SCHEDULES[self.mode](min(step, self.total_steps), self.total_steps, self.k_min, self.k_max)
        return min(max(k, self.k_min), self.k_max)
