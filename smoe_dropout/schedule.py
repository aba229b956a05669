"""Schedules of k, pure functions of the training step: the official code's seven modes, a constant, and a random k for every step."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from smoe_dropout.arguments import LARGEST, integer
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import unknown

_DOUBLING = (1, 2, 4, 8, 16)


def _exponential(step: int, total: int) -> float:
    # 300 equal intervals, as in the official code, which divides by zero below 300 steps
    stretch = step // (total // 300) if total >= 300 else 300 * step // total
    return 0.99**stretch


def _doubling(step: int, total: int) -> int:
    return min(int(len(_DOUBLING) * step / total), len(_DOUBLING) - 1)


# (schedule, step t) -> k before clipping; Python's rounding, half to even, as in the official code
SCHEDULES: dict[str, Callable[["TopKSchedule", int], int]] = {
    "linear_increase": lambda s, t: round((s.k_max - s.k_min) * t / s.total_steps) + s.k_min,
    "linear_decrease": lambda s, t: round(-(s.k_max - s.k_min) * t / s.total_steps) + s.k_max,
    "cosine_decrease": lambda s, t: round((s.k_max - s.k_min) * math.cos(math.pi * t / (2 * s.total_steps))) + s.k_min,
    "cosine_increase": lambda s, t: round(-(s.k_max - s.k_min) * math.cos(math.pi * t / (2 * s.total_steps))) + s.k_max,
    "exp_increase": lambda s, t: round(-(s.k_max - s.k_min) * _exponential(t, s.total_steps)) + s.k_max,
    "multi_step_increase": lambda s, t: _DOUBLING[_doubling(t, s.total_steps)],
    "multi_step_decrease": lambda s, t: _DOUBLING[::-1][_doubling(t, s.total_steps)],
    "constant": lambda s, t: s.k_max,
    # not in the paper: uniform over k_min..k_max at every step, k_max after the last
    "elastic": lambda s, t: random.Random(s.seed * 2**40 + t).randint(s.k_min, s.k_max) if t < s.total_steps else s.k_max,
}


@dataclass(frozen=True)
class TopKSchedule:
    """k(step) within k_min..k_max; steps beyond `total_steps` keep the last value. Paper section 3.2: linear from E/2 to E.

    mode: a name in `SCHEDULES`. seed: of modes that draw k at random. Raises ConfigError for an unknown mode, k_min > k_max, and numbers
    that are not whole or below 1.
    """

    mode: str
    k_min: int
    k_max: int
    total_steps: int
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.mode, str) or self.mode not in SCHEDULES:
            raise ConfigError(unknown("schedule", str(self.mode), SCHEDULES))
        for name, least, most in (("k_min", 1, LARGEST), ("k_max", 1, LARGEST), ("total_steps", 1, None), ("seed", None, None)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least, most))
        if self.k_min > self.k_max:
            raise ConfigError(f"k_min = {self.k_min} and k_max = {self.k_max} must satisfy 1 <= k_min <= k_max")

    @property
    def drawn(self) -> bool:
        """Return whether every step has a k of its own, drawn at random."""
        return self.mode == "elastic"

    def __str__(self) -> str:
        return f"{self.mode}, {self.k_min} to {self.k_max} over {self.total_steps:,} steps"

    def __call__(self, step: int) -> int:
        """The k of this step, counted from 0. ConfigError unless it is a whole number of at least 0."""
        k = SCHEDULES[self.mode](self, min(integer("step", step, 0, None), self.total_steps))
        return min(max(k, self.k_min), self.k_max)
