"""How long a run would take on a CPU, from a step timed before it begins."""

import time

import torch

from smoe_dropout import set_progress, set_top_k
from smoe_dropout.methods.base import Forward, cross_entropy
from utils.errors import UserError
from utils.flags.derive import method_of, top_k_schedule
from utils.formatting import duration
from utils.models.build import training_settings
from utils.tasks.base import Task

CPU_PATIENCE = 2 * 3600  # seconds of training on a CPU beyond which we ask first
PROBE_PATIENCE = 20  # seconds a timed step may take


def refuse_if_too_slow(task: Task) -> None:
    """On a CPU, times a training step, of one row first, and raises UserError when the whole run would take hours."""
    flags, engine = task.flags, task.engine
    if engine.device.type != "cpu":
        return

    def timed(rows: int) -> float:  # all processes have to decide alike
        return engine.sum([time_step(task, rows)])[0] / engine.world_size

    seconds = timed(1) * flags.batch_size
    if seconds * flags.max_step > CPU_PATIENCE and seconds < PROBE_PATIENCE:  # a small model's rows cost less together than one by one
        seconds = timed(flags.batch_size)
    if seconds * flags.max_step > CPU_PATIENCE:
        raise UserError(
            f"{flags.max_step:,} steps of batch {flags.batch_size} would take about {duration(seconds * flags.max_step)} on this CPU "
            f"(timed just now): use --preset laptop (minutes) or --preset quick, run on a GPU, or add --yes to go on"
        )


def time_step(task: Task, rows: int) -> float:
    """Seconds for the gradients of so many rows, with memory, at the largest k."""
    flags = task.flags
    model, method = task.build().train(), method_of(flags)
    set_progress(model, flags.max_step - 1, flags.max_step)  # the full rate of what grows with training
    if flags.moe:
        set_top_k(model, top_k_schedule(flags).k_max)
    inputs, state = [tensor[:rows] for tensor in task.peek().inputs], task.full_state(rows)

    def forward() -> Forward:
        with torch.autocast("cpu", torch.bfloat16, enabled=flags.precision == "bf16"):
            return Forward(*model(*inputs, state))

    seconds = float("inf")
    for _ in range(2):  # the first also warms up
        begin = time.perf_counter()
        settings = training_settings(flags, len(task.corpus.train))
        (method.objective if method else cross_entropy)(model, forward, settings).total.backward()
        seconds = min(seconds, time.perf_counter() - begin)
    return seconds
