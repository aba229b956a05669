"""The command line of finetune.py: the checkpoint says what the model is, a preset how it is fine-tuned. Imports no torch.

Order of precedence: the command line, the preset, the checkpoint. What the checkpoint decides cannot be given otherwise.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from smoe_dropout.registry import METHODS, load, unknown
from utils.checkpoints.origin import Source, kind_of, open_source
from utils.cli.argv import from_command_line, value_of, without_refused
from utils.cli.inherit import contradictions, decided, of_the_checkpoint, preset_of
from utils.data.rows import KINDS, TASKS
from utils.errors import UserError, exit_on_user_error
from utils.flags.check import check
from utils.flags.derive import finetuning_k, read_config
from utils.flags.fields import OF_PIECES, FinetuneFlags
from utils.flags.presets import finetuning


def parse(argv: Sequence[str] | None = None) -> tuple[FinetuneFlags, Source]:
    """The flags of a command line, every default decided, and the checkpoint. Raises UserError listing all mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, mistakes = without_refused(argv)
    if {"-h", "--help"} & set(argv):
        from_command_line(argv, FinetuneFlags(), "finetune.py")
    given = value_of(argv, "checkpoint")
    if given is None:
        raise UserError("--checkpoint is missing: give the folder of a finished run of train.py")
    source = open_source(Path(given))
    task = value_of(argv, "task") or FinetuneFlags.task
    if task not in TASKS:
        raise UserError("--task: " + unknown("task", task, list(TASKS)))
    preset = preset_of(source, argv)
    values = of_the_checkpoint(source, preset, argv)
    how = finetuning(task, preset, values["model"])
    defaults = FinetuneFlags(**{**values, **how, **finetuning_k(values), "task": task, "dataset": task, "preset": preset})
    flags = from_command_line(argv, defaults, "finetune.py")
    mistakes += contradictions(flags, source) + _expectation(flags, source) + _rows_seen(flags, source)
    mistakes += check(flags) + _check_finetuning(flags)
    return decided(flags, source, mistakes), source


def check_stored(flags: FinetuneFlags, fingerprint: str) -> None:
    """UserError where --eval_only would score other rows than the run's, or not all of them."""
    if mistakes := _check_finetuning(flags):
        raise UserError("; ".join(mistakes))
    if read_config(Path(flags.work_dir)).get("data_fingerprint") != fingerprint:
        raise UserError(
            f"{flags.data} holds other rows than the run in {flags.work_dir} is of: --data, --task and --fold have to be the run's"
        )


def _check_finetuning(flags: FinetuneFlags) -> list[str]:
    """One sentence for every mistake that only fine-tuning knows."""
    found = [
        f"--{name} {value}: a score is of all rows, leave it out"
        for name in ("max_eval_steps", "max_test_steps")
        if (value := getattr(flags, name)) != -1
    ]
    if flags.start_from is not None:
        found.append(f"--start_from {flags.start_from}: give what fine-tuning starts from with --checkpoint")
    if flags.moe_prune_to is not None:
        found.append(f"--moe_prune_to {flags.moe_prune_to} means nothing to finetune.py: prune with train.py --start_from first")
    if flags.teacher is not None:
        found.append(f"--teacher {flags.teacher} means nothing to finetune.py: leave it out")
    most = max(kind.folds for kind in KINDS.values())
    if not 0 <= flags.fold < most:
        found.append(f"--fold {flags.fold} must be from 0 to {most - 1}")
    if flags.scheduler == "dev_perf":
        found.append("--scheduler dev_perf would choose by rows that are for scoring only: use another")
    longest = max(512, flags.tgt_len) if flags.model in OF_PIECES else flags.max_length
    if not 3 <= flags.max_length <= longest:
        found.append(f"--max_length {flags.max_length} must be from 3 to the {longest} positions of the model")
    return found


def _rows_seen(flags: FinetuneFlags, source: Source) -> list[str]:
    """A sentence where rows that are held out decided which experts the model has."""
    read = (source.surgery or {}).get("read") or {}
    if read.get("task") != flags.task or read.get("fold", flags.fold) == flags.fold:
        return []
    remedy = f"make one by surgery.py --task {flags.task} --fold {flags.fold}"
    return [f"--fold {flags.fold}: its rows were read when {source.path} was made; {remedy}"]


def _expectation(flags: FinetuneFlags, source: Source) -> list[str]:
    """A sentence where the checkpoint is not of the --expect'ed method."""
    if flags.expect is None:
        return []
    if flags.expect not in METHODS:
        return ["--expect: " + unknown("method", flags.expect, METHODS)]
    without = not load(METHODS, "method", flags.expect).sparse
    fits = not flags.moe if without else flags.method == flags.expect
    wanted = "one without experts" if without else f"one of {flags.expect}"
    return [] if fits else [f"the checkpoint {source.path} is of {kind_of(source)}, and this needs {wanted}"]


if __name__ == "__main__":  # python -m utils.cli.finetune ARGS...: checks a command line of finetune.py and prints what it decides
    with exit_on_user_error():
        print(json.dumps(dataclasses.asdict(parse()[0]), indent=1))
