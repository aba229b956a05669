"""Evaluation: the quality of a model on a split, at any number of active experts."""

import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from smoe_dropout import top_k
from utils.models.flops import active_parameters, forward_flops
from utils.tasks.base import Task

REPEATS, BATCHES = 5, 10  # of a timed evaluation pass


def forked_random(device: torch.device):
    """Context manager that restores the random generators on exit."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: str, k: int | None, max_steps: int = -1, attacked: bool = False) -> dict[str, float]:
    """Measures the task's metric on a split: its value and further ones, positions read, those with a loss, positions read per second.
    attacked: corrupts the input.

    Methods that draw experts draw the same ones in every evaluation, from the run's seed. k, mode and memory length of the model, and the
    random generators, are restored. Rows are distributed over processes; the mean is over all positions with a loss.
    """
    engine, was_training = task.engine, model.training
    model.eval()
    measured, targets, tokens, state, begin = 0.0, 0, 0, None, time.perf_counter()
    try:
        with task.evaluation(model), top_k(model, k) if k is not None else nullcontext(), forked_random(engine.device):
            torch.manual_seed(task.flags.seed + engine.rank)
            for index, batch in enumerate(task.held_out(split, attacked=attacked)):
                if index == max_steps:
                    break
                value, count, state = task.measure(model, batch, state)
                measured += value
                targets += count
                tokens += batch.inputs[0].numel()
    finally:
        model.train(was_training)
    measured, targets, tokens = engine.sum([measured, targets, tokens])
    quality = {task.metric.name: task.metric.of(measured / targets), **task.metric.also(split, measured / targets)}
    speed = tokens / (time.perf_counter() - begin)
    return {**quality, "tokens": int(tokens), "targets": int(targets), "tokens_per_second": speed}


def evaluate_all(task: Task, model: nn.Module, splits: tuple[str, ...], ks: list[int | None], say) -> list[dict]:
    """One row for each k: quality on every split, tokens read, parameters and FLOPs per token, speed. Passes each row to `say` as text."""
    rows, metric, shape = [], task.metric.name, task.evaluation_shape
    for k in ks:
        measured = {split: evaluate(task, model, split, k, task.flags.max_test_steps) for split in splits}
        if task.attack:
            measured[f"{splits[-1]}_attacked"] = evaluate(task, model, splits[-1], k, task.flags.max_test_steps, attacked=True)
        parameters, ffn_parameters = active_parameters(model, k)
        row = {"k": k, **{split: values[metric] for split, values in measured.items()}}
        further = [name for name in measured[splits[-1]] if name not in (metric, "tokens_per_second")]
        row |= {f"{split}_{name}": values[name] for split, values in measured.items() for name in further}
        row |= {"active_parameters": parameters, "active_ffn_parameters": ffn_parameters}
        row["flops_per_token"] = forward_flops(task.flags.model, model, shape, k) / (shape.rows * shape.positions)
        row["tokens_per_second"] = measured[splits[-1]]["tokens_per_second"]
        rows.append(row)
        at = "dense" if k is None else f"k = {k}"
        quality = ", ".join(f"{split} {values[metric]:.4f}" for split, values in measured.items())
        cost = f"{parameters:,} active parameters, {row['flops_per_token']:.3e} FLOPs per token, {row['tokens_per_second']:,.0f} tokens/s"
        say(f"{at:>7}: {quality} {metric}; {cost}")
    return rows


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
