"""The command line of finetune.py: the checkpoint sets the model's flags, a preset how it is fine-tuned. Imports no torch.

`python -m utils.cli.finetune ARGS` checks a command line and prints the decided flags as JSON.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoe_dropout.registry import METHODS, load
from utils.checkpoints.origin import Source, kind_of, open_source
from utils.cli.arguments import Arguments, Values
from utils.cli.pipeline import CHECKPOINT_FLAGS, Program, contradictions, decide, inherited
from utils.data.rows import TASKS
from utils.data.rows import kind_of as task_kind
from utils.errors import exit_on_user_error
from utils.flags.derive import finetuning_k
from utils.flags.fields import FinetuneFlags, names
from utils.flags.models import MODELS
from utils.flags.official import REFUSED
from utils.flags.presets import PRESET_NAMES, finetuning


def parse(given: Sequence[str] | Values | None = None) -> tuple[FinetuneFlags, Source]:
    """The flags of a command line, or of values, and the checkpoint. Raises UserError listing all mistakes."""
    flags, source = decide(PROGRAM, given)
    return flags, source or open_source(Path(flags.checkpoint))


def _defaults(command: Arguments | Values, source: Source) -> dict[str, Any]:
    kept = (*CHECKPOINT_FLAGS, *names(role="training"), "preset")
    values = {name: value for name, value in inherited(command, source).items() if name in kept}
    task, preset = command.get("task") or FinetuneFlags.task, values["preset"]
    known = preset in PRESET_NAMES and values["model"] in MODELS
    tuning = finetuning(task, preset, values["model"]) if known else {}
    longest = {"max_length": min(most, FinetuneFlags.max_length)} if (most := source.flags.get("max_length")) else {}
    return {**values, **tuning, **finetuning_k(values), **longest, "task": task, "dataset": task}


def _mistakes(flags: FinetuneFlags, source: Source | None) -> list[str]:
    found = [
        f"--{name} {value}: the score covers all rows; leave it out"
        for name in ("max_eval_steps", "max_test_steps")
        if (value := getattr(flags, name)) != -1
    ]
    if flags.moe_prune_to is not None:
        found.append(f"--moe_prune_to {flags.moe_prune_to} has no effect with finetune.py: prune with train.py --start_from first")
    if flags.attn_type > 1:
        found.append(f"--attn_type {flags.attn_type}: positions are counted from the end, so padding moves them; give a model of 0 or 1")
    if flags.varlen:
        found.append("--varlen has no effect with finetune.py, whose rows differ in length: leave it out")
    if flags.tokens is not None:
        found.append(f"--tokens {flags.tokens}: rows differ in length; use --max_step")
    if flags.from_scratch and flags.model in MODELS and MODELS[flags.model].from_folder:
        found.append(f"--from_scratch: --model {flags.model} has the weights of its folder; leave it out")
    folds = max(task_kind(task).folds for task in TASKS)
    if flags.fold >= folds:
        found.append(f"--fold {flags.fold} must be from 0 to {folds - 1}")
    if flags.scheduler == "dev_perf":
        found.append("--scheduler dev_perf would tune on the rows the score is reported on: choose another")
    longest = max(512, flags.tgt_len)
    if flags.model in MODELS and "pieces" in MODELS[flags.model].reads and flags.max_length > longest:
        found.append(f"--max_length {flags.max_length} must be at most the {longest} positions of the model")
    if source is None:
        return found
    return found + contradictions(flags, source, CHECKPOINT_FLAGS) + _check_method(flags, source) + _check_fold(flags, source)


def _check_fold(flags: FinetuneFlags, source: Source) -> list[str]:
    """The rows held out must not have been used to choose the experts."""
    read = [operation.get("read") or {} for operation in source.operations]
    if all(one.get("task") != flags.task or one.get("fold", flags.fold) == flags.fold for one in read):
        return []
    remedy = f"make one with surgery.py --task {flags.task} --fold {flags.fold}"
    return [f"--fold {flags.fold}: its rows were used to make {source.path}; {remedy}"]


def _check_method(flags: FinetuneFlags, source: Source) -> list[str]:
    """The checkpoint must be of the method of --expect."""
    if flags.expect is None or flags.expect not in METHODS:
        return []
    dense = not load(METHODS, "method", flags.expect).sparse
    if not flags.moe if dense else flags.method == flags.expect:
        return []
    expected = "a dense method" if dense else f"--method {flags.expect}"
    return [f"the checkpoint {source.path} is of {kind_of(source)}, not of {expected}: choose another"]


REFUSED_HERE = REFUSED | dict.fromkeys(names(group="initialisation"), "fine-tuning starts from --checkpoint, and has no teacher")
PROGRAM = Program("finetune.py", FinetuneFlags, "checkpoint", True, defaults=_defaults, mistakes=_mistakes, refused=REFUSED_HERE)

if __name__ == "__main__":
    with exit_on_user_error():
        print(json.dumps(dataclasses.asdict(parse()[0]), indent=1))
