"""How long a run would take on a CPU, from a step timed before it begins."""

import time

import torch

from smoe_dropout import set_progress, set_top_k
from smoe_dropout.methods.base import Forward, cross_entropy
from utils.command_line import method_of, top_k_schedule
from utils.data import Corpus, LaneIterator
from utils.engine import Engine
from utils.errors import UserError
from utils.flags import Flags
from utils.model import build_model, training_settings
from utils.progress import duration

CPU_PATIENCE = 2 * 3600  # seconds of training on a CPU beyond which we ask first
PROBE_PATIENCE = 20  # seconds a timed step may take


def refuse_if_too_slow(engine: Engine, flags: Flags, corpus: Corpus, train_data: LaneIterator) -> None:
    """On a CPU, times a training step, of one lane first, and raises UserError when the whole run would take hours."""
    if engine.device.type != "cpu":
        return

    def timed(lanes: int) -> float:  # all processes have to decide alike
        return engine.sum([time_step(flags, corpus, train_data, lanes)])[0] / engine.world_size

    seconds = timed(1) * flags.batch_size
    if seconds * flags.max_step > CPU_PATIENCE and seconds < PROBE_PATIENCE:  # a small model's lanes cost less together than one by one
        seconds = timed(flags.batch_size)
    if seconds * flags.max_step > CPU_PATIENCE:
        raise UserError(
            f"{flags.max_step:,} steps of batch {flags.batch_size} x {flags.tgt_len} would take about "
            f"{duration(seconds * flags.max_step)} on this CPU (timed just now): use --preset laptop (minutes) or --preset quick, "
            f"run on a GPU, or add --yes to go on"
        )


def time_step(flags: Flags, corpus: Corpus, train_data: LaneIterator, lanes: int) -> float:
    """Seconds for the gradients of so many lanes, with memory, at the largest k."""
    model, method = build_model(flags).train(), method_of(flags)
    set_progress(model, flags.max_step - 1, flags.max_step)  # the full rate of what grows with training
    if flags.moe:
        set_top_k(model, top_k_schedule(flags).k_max)
    segment = next(train_data.one_pass())
    memory = tuple(torch.zeros(lanes, flags.mem_len, flags.d_model) for _ in range(flags.n_layer + 1))

    def forward() -> Forward:
        with torch.autocast("cpu", torch.bfloat16, enabled=flags.precision == "bf16"):
            return Forward(*model(segment.tokens[:lanes], segment.targets[:lanes], memory))

    seconds = float("inf")
    for _ in range(2):  # the first also warms up
        begin = time.perf_counter()
        (method.objective if method else cross_entropy)(model, forward, training_settings(flags, len(corpus.train))).total.backward()
        seconds = min(seconds, time.perf_counter() - begin)
    return seconds
