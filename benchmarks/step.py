"""One training step of Transformer-XL as in train.py: forward, backward, clipping, Adam; memory from the previous step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import Precision, autocast, compare
from benchmarks.model import OFFICIAL, ModelFlags, contestants, least_ratio, random_batches
from mem_transformer import MemTransformerLM
from utils.flags.fields import Flags
from utils.training.optimizer import build_optimizer

BASELINE = OFFICIAL


@dataclass(frozen=True)
class StepFlags(ModelFlags):
    """Time of a training step relative to the same model computed the official way."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    k: int = 8
    """active experts"""


def training_step(model: MemTransformerLM, flags: StepFlags, precision: Precision, seed: int = 1) -> Callable[[], float]:
    """Returns a function that takes one step and returns the loss before it. It has run once, so that the memory is filled."""
    settings = Flags()
    optimizer = build_optimizer(model.train(), settings)
    batches, memory = random_batches(flags, flags.tgt_len + 1, seed), None

    def step() -> float:
        nonlocal memory
        batch = next(batches)
        with autocast(precision, flags.device):
            losses, memory, _ = model(batch[:, :-1], batch[:, 1:], memory)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step()
    return step


def measure_row(flags: StepFlags, precision: Precision, official: Precision) -> dict[str, Any]:
    """Measures all contestants in one precision, except the official way, which has its own."""
    models = contestants(flags, flags.k)
    steps = {
        name: training_step(model, flags, official if name == OFFICIAL else precision, seed)
        for seed, (name, model) in enumerate(models.items())
    }
    results = compare(steps, flags, BASELINE)
    label = precision if official == precision else f"{precision}, official {official}"
    return {"precision": label, "k": flags.k, "bound": least_ratio(models, flags), "results": results}


def rows(flags: StepFlags) -> list[dict[str, Any]]:
    """A row for each precision, and with several, one that compares the last with the official way in the first, its default."""
    pairs = [(precision, precision) for precision in flags.precision]
    if len(pairs) > 1:
        pairs.append((flags.precision[-1], flags.precision[0]))
    return [measure_row(flags, *pair) for pair in pairs]
