"""Calibration passes for surgery, and measurements of a model before and after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout import moe_layers
from utils.flags.derive import evaluation_ks
from utils.formatting import short_number
from utils.models.flops import parameter_counts
from utils.models.registry import architecture
from utils.tasks.base import Task
from utils.tasks.labelled import LabelledTask
from utils.training.evaluation import evaluate, evaluate_all

REPEATS, BATCHES = 5, 10  # of a timed pass
Pass = tuple[Callable[[], None], Tensor | None]  # runs the model once; mask of the positions [N, T] that count, None for all


def text_passes(task: Task, model: nn.Module, positions: int) -> Iterator[Pass]:
    """Yields a forward pass over each training batch of a text, in order, until `positions` are read."""
    state, read = None, 0
    while read < positions:
        batch = task.next()

        def run(batch=batch) -> None:
            nonlocal state
            with task.engine.autocast():
                _, state, _ = model(*batch.inputs, None if batch.first else state)

        yield run, None
        read += batch.inputs[0].numel()


def row_passes(task: LabelledTask, model: nn.Module, positions: int) -> Iterator[Pass]:
    """Yields forward passes over the rows of a fine-tuning task, without its head; padding does not count."""
    read = 0
    while read < positions:
        tokens_NT, lengths_N = task.sequences_of(task.next())

        def run(tokens_NT=tokens_NT, lengths_N=lengths_N) -> None:
            with task.engine.autocast():
                architecture(task.flags.model).hidden_states(model, tokens_NT, lengths_N)

        real_NT = torch.arange(tokens_NT.shape[1], device=tokens_NT.device) < lengths_N[:, None]
        yield run, real_NT
        read += int(real_NT.sum())


def measured(when: str, task: Task, model: nn.Module, say: Callable[[str], None]) -> dict[str, Any]:
    """Numbers of experts in each layer, parameters, and the quality at every k on the split shown in tables."""
    say(f"{when}:")
    sizes = [layer.num_experts for _, layer in moe_layers(model)]
    quality = evaluate_all(task, model, task.splits[-1:], evaluation_ks(task.flags), say)
    return {"experts": sizes, "parameters": parameter_counts(model)["total"], "quality": quality}


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


def as_text(surgery: dict[str, Any]) -> str:
    """The before/after table printed by surgery.py."""
    before, after, metric = surgery["before"], surgery["after"], surgery["metric"]
    lines = [f"{'k':>4}  {metric['split'] + ' ' + metric['name']:>20}  {'activated parameters':>20}  {'FLOPs a token':>20}"]
    rows = [{row["k"]: row for row in part["quality"]} for part in (before, after)]
    forms = {metric["split"]: "{:.4f}".format, "active_parameters": short_number, "flops_per_token": short_number}
    for k in sorted(rows[0].keys() | rows[1].keys()):
        cells = [" -> ".join(form(part[k][name]) if k in part else "none" for part in rows) for name, form in forms.items()]
        lines.append(f"{k:>4}" + "".join(f"  {cell:>20}" for cell in cells))
    lines.append(f"experts of each layer: {' -> '.join(str(part['experts']) for part in (before, after))}")
    lines.append(f"parameters: {before['parameters']:,} -> {after['parameters']:,}")
    lines += [f"pass time, k = {one['k'][0]} -> k = {one['k'][1]}: x {one['ratio']:.2f}" for one in surgery["time"]]
    return "\n".join(lines)
