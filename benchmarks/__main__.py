"""python -m benchmarks [--tuned] [--rounds N]: all benchmarks at their default sizes, their records and figures, and the one table.

python -m benchmarks {layer,attention,step,evaluation,generation,memory,growth,mixed,softmax,data} [flags]: one of them.
python -m benchmarks speculation --checkpoints RUN ... [flags]: generation by drafts, by trained models.
python -m benchmarks backends [flags]: measure the table by which the backend `auto` chooses.
python -m benchmarks tradeoff RUN... [flags]: quality of trained models against time and FLOPs, by the ways to choose k.
python -m benchmarks slimmable STAGE=FOLDER... [flags]: quality and time of converted models of transformers.
Ratios are valid only if nothing else runs on the machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

import smoe_dropout
from benchmarks import (
    attention,
    data,
    evaluation,
    generation,
    growth,
    layer,
    memory,
    mixed,
    slimmable,
    slimmable_trials,
    softmax,
    speculation,
    step,
    tradeoff,
)
from benchmarks.backends import BackendFlags, measure_table
from benchmarks.measure import Common, Device, record
from benchmarks.tables import RECORDS, markdown, summary
from utils.errors import exit_on_user_error

BENCHMARKS = {
    "layer": layer,
    "attention": attention,
    "step": step,
    "evaluation": evaluation,
    "generation": generation,
    "memory": memory,
    "growth": growth,
    "mixed": mixed,
    "softmax": softmax,
    "data": data,
    "speculation": speculation,
}
FLAGS = {
    "layer": layer.LayerFlags,
    "attention": attention.AttentionFlags,
    "step": step.StepFlags,
    "evaluation": evaluation.EvaluationFlags,
    "generation": generation.GenerationFlags,
    "memory": memory.MemoryFlags,
    "growth": growth.GrowthFlags,
    "mixed": mixed.MixedFlags,
    "softmax": softmax.SoftmaxFlags,
    "data": data.DataFlags,
    "speculation": speculation.SpeculationFlags,
}


@dataclass(frozen=True)
class AllFlags:
    """All benchmarks at their default sizes."""

    rounds: int | None = None
    """rounds measured, after one that warms up; each benchmark has its own default"""
    out: Path = RECORDS
    """folder of the records and figures"""
    device: Device = "cpu"
    """where to compute"""
    tuned: bool = False
    """set torch up for this CPU first (smoe_dropout.tune_cpu)"""

    def each(self) -> list[Common]:
        """The flags of every benchmark."""
        common = {"out": self.out, "device": self.device, "tuned": self.tuned} | ({"rounds": self.rounds} if self.rounds else {})
        return [replace(kind(), **common) for name, kind in FLAGS.items() if name != "speculation"]  # which needs trained models


def measure(flags: Common, tuned: Sequence[str]) -> dict[str, Any]:
    """Runs one benchmark, and writes its record and its figure if it has one."""
    name = next(name for name, kind in FLAGS.items() if type(flags) is kind)
    torch.set_num_threads(flags.threads)
    found = record(name, flags, BENCHMARKS[name].BASELINE, BENCHMARKS[name].rows(flags), tuned)
    if name in ("layer", "growth"):
        from benchmarks.figures import draw  # here, because it imports matplotlib

        draw(found, flags.out)
    return found


def run(settings: Sequence[Common]) -> None:
    """Runs benchmarks one after another, and prints the summary of several, or the table of one."""
    tuned = smoe_dropout.tune_cpu() if settings[0].tuned else []
    records = [measure(flags, tuned) for flags in settings]
    print(summary(records) if len(records) > 1 else markdown(records[0]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["all", *arguments]
    kinds = {"all": AllFlags, **FLAGS, "backends": BackendFlags, "tradeoff": tradeoff.TradeoffFlags}
    kinds["slimmable"] = slimmable.SlimmableFlags
    flags = tyro.extras.subcommand_cli_from_dict(kinds, prog="benchmarks", args=arguments)
    if isinstance(flags, BackendFlags):
        torch.set_num_threads(flags.threads)
        measure_table(flags, smoe_dropout.tune_cpu() if flags.tuned else [])
        return
    if isinstance(flags, tradeoff.TradeoffFlags):
        tradeoff.run(flags)
        return
    if isinstance(flags, slimmable.SlimmableFlags):
        slimmable.run(flags)
        if flags.calibration is not None:
            slimmable_trials.run(flags)
        return
    run(flags.each() if isinstance(flags, AllFlags) else [flags])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
