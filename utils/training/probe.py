"""Estimates how long a run would take on a CPU, by timing a step before it starts."""

import time

import torch

from smoe_dropout import set_progress, set_top_k
from smoe_dropout.methods.base import Forward
from utils.errors import UserError
from utils.flags.derive import top_k_schedule
from utils.formatting import duration
from utils.training.run import Run

CPU_PATIENCE = 2 * 3600  # seconds of training on a CPU above which --yes is required
PROBE_PATIENCE = 20  # seconds a timed step may take


def refuse_if_too_slow(run: Run) -> None:
    """On a CPU, times a training step, first of a single row, and raises UserError if the run would take hours."""
    flags, engine = run.flags, run.engine
    if engine.device.type != "cpu":
        return

    def timed(rows: int) -> float:  # the mean over processes, which must agree
        return engine.sum([time_step(run, rows)])[0] / engine.world_size

    seconds = timed(1) * flags.batch_size
    if seconds * flags.max_step > CPU_PATIENCE and seconds < PROBE_PATIENCE:  # rows of a small model cost less in a batch
        seconds = timed(flags.batch_size)
    if seconds * flags.max_step > CPU_PATIENCE:
        smaller = "use --preset laptop (about 15 minutes) or quick, " if flags.preset not in ("laptop", "replica", "quick") else ""
        raise UserError(
            f"{flags.max_step:,} steps of batch {flags.batch_size} would take about {duration(seconds * flags.max_step)} on this CPU "
            f"(one step was timed): {'' if smaller else 'stop what else runs on it, '}{smaller}run on a GPU, or add --yes to run anyway"
        )


def time_step(run: Run, rows: int) -> float:
    """Seconds for the gradients of `rows` rows, with memory, at the largest k."""
    flags, model, objective = run.flags, run.build().train(), run.objective()
    set_progress(model, flags.max_step - 1, flags.max_step)  # with schedules at their final values
    if flags.moe:
        set_top_k(model, top_k_schedule(flags).k_max)
    inputs, state = tuple(tensor[:rows] for tensor in run.task.peek().inputs), None

    def forward() -> Forward:
        with torch.autocast("cpu", torch.bfloat16, enabled=flags.precision == "bf16"):
            return run.forward(lambda inputs, state: Forward(*model(*inputs, state)), inputs, state)

    for _ in range(2):  # the first pass warms up and fills the memory
        begin = time.perf_counter()
        part = objective(model, forward)
        part.total.backward()
        state, seconds = part.state, time.perf_counter() - begin
    return seconds
