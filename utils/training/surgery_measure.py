"""Times a model before and after surgery."""

import statistics
import time
from typing import Any

from torch import nn

from utils.tasks.base import Task
from utils.training.evaluation import evaluate

REPEATS, BATCHES = 5, 10  # of a timed pass


def time_ratios(before: tuple[Task, nn.Module], after: tuple[Task, nn.Module]) -> list[dict[str, Any]]:
    """Ratios after/before of the time of an evaluation pass, from medians of alternating passes: with all experts of each model active, and
    with the same number active in both.
    """
    all_before, all_after = (task.flags.moe_num_expert for task, _ in (before, after))
    ratios = []
    for k_before in sorted({all_before, all_after}, reverse=True):
        taken = [(_seconds(*before, k_before), _seconds(*after, all_after)) for _ in range(REPEATS + 1)]
        old, new = (statistics.median(seconds) for seconds in zip(*taken[1:], strict=True))  # the first pass warms up
        ratios.append({"k": [k_before, all_after], "ratio": new / old})
    return ratios


def chained(earlier: dict[str, Any], ratios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios of a chain of operations: with all experts active, the product of the earlier ratio and this one."""
    if "time" not in earlier:
        return ratios
    first, this = earlier["time"][0], ratios[0]
    return [{"k": [first["k"][0], this["k"][1]], "ratio": first["ratio"] * this["ratio"]}]


def _seconds(task: Task, model: nn.Module, k: int) -> float:
    begin = time.perf_counter()
    evaluate(task, model, task.splits[-1], k, BATCHES)
    return time.perf_counter() - begin
