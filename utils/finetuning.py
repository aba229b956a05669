"""The command line of finetune.py: the checkpoint says what the model is, a preset how it is fine-tuned. Imports no torch.

Order of precedence: the command line, the preset, the checkpoint. What the checkpoint decides cannot be given otherwise.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoe_dropout.registry import METHODS, load, unknown
from utils import command_line
from utils.command_line import FlagsOf, check, from_command_line, read_config, resolve, value_of, without_refused
from utils.errors import UserError, exit_on_user_error
from utils.examples import KINDS, TASKS
from utils.flags import CHOICES, OF_PIECES, FinetuneFlags, Flags
from utils.presets import PRESETS, finetuning
from utils.source import Source, kind_of, open_source

# what the weights mean: the checkpoint's, always
OF_THE_MODEL = (
    *("model", "n_layer", "n_head", "d_head", "d_model", "d_ff", "d_inner", "tgt_len", "mem_len", "eval_tgt_len", "mask_rate"),
    *("pre_lnorm", "same_length", "clamp_len", "not_tied", "init_std"),
)
OF_THE_EXPERTS = (
    *("method", "moe", "moe_num_expert", "moe_experts_by_layer", "gate_name", "moe_index", "output_scale", "gate_weight", "attn_moe"),
    *("moe_expert_rank", "moe_sparse_share", "dense_drop", "dense_width"),
)
# what it is trained with: the checkpoint's, unless something else is asked for
KEPT = ("dynamic_moe_mode", "method_options", "dropout", "dropatt", "freeze_gate", "load_balance")


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
    defaults = FinetuneFlags(**{**values, **how, **_experts(values), "task": task, "dataset": task, "preset": preset})
    flags = from_command_line(argv, defaults, "finetune.py")
    mistakes += contradictions(flags, source) + _expectation(flags, source) + _rows_seen(flags, source)
    mistakes += check(flags) + _check_finetuning(flags)
    return decided(flags, source, mistakes), source


def preset_of(source: Source, argv: list[str]) -> str:
    """The command line's, or else the checkpoint's. UserError for one there is not."""
    preset = value_of(argv, "preset") or source.flags.get("preset", Flags.preset)
    if preset not in CHOICES["preset"]:
        raise UserError("--preset: " + unknown("preset", preset, list(CHOICES["preset"])))
    return preset


def decided(flags: FlagsOf, source: Source, mistakes: list[str]) -> FlagsOf:
    """With every default decided; the method is the checkpoint's, also where that is none. UserError where there are mistakes."""
    if mistakes:
        raise UserError("; ".join(mistakes) + " (nothing was started; --help lists all flags)")
    flags = resolve(flags)
    return dataclasses.replace(flags, method=None) if source.flags.get("method", "") is None else flags


def check_stored(flags: FinetuneFlags, fingerprint: str) -> None:
    """UserError where --eval_only would score other rows than the run's, or not all of them."""
    if mistakes := _check_finetuning(flags):
        raise UserError("; ".join(mistakes))
    if read_config(Path(flags.work_dir)).get("data_fingerprint") != fingerprint:
        raise UserError(
            f"{flags.data} holds other rows than the run in {flags.work_dir} is of: --data, --task and --fold have to be the run's"
        )


def of_the_checkpoint(source: Source, preset: str, argv: list[str]) -> dict[str, Any]:
    """The checkpoint's flags of the model. Weights alone have what preset and method say in pre-training. UserError for an unknown name."""
    known = source.flags
    model = known.get("model") or value_of(argv, "model") or Flags.model
    if model not in PRESETS:
        raise UserError("--model: " + unknown("model", model, list(PRESETS)))
    method = known.get("method") or value_of(argv, "method")
    if method is not None and method not in METHODS:
        raise UserError("--method: " + unknown("method", method, METHODS))
    values: dict[str, Any] = {}
    if "preset" not in known:
        values = {**PRESETS[model][preset], **(load(METHODS, "method", method).flags if method else {})}
    values = {**values, **known, "model": model, "method": method}
    return {name: value for name, value in values.items() if name in (*OF_THE_MODEL, *OF_THE_EXPERTS, *KEPT)}


def _experts(values: dict[str, Any]) -> dict[str, Any]:
    """k while fine-tuning: all experts, as in the paper, but where the method itself is made for another."""
    if not values.get("moe"):
        return {}
    meant = load(METHODS, "method", values["method"]).flags if values["method"] else {}
    return {"moe_top_k": meant.get("moe_top_k", values.get("moe_num_expert", FinetuneFlags.moe_num_expert)), "dynamic_moe": False}


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


def contradictions(flags: Flags, source: Source) -> list[str]:
    """What the command line says otherwise than the checkpoint."""
    known = source.flags
    return [
        f"--{name} {getattr(flags, name)}, but the checkpoint {source.path} has {name} = {known[name]}: leave it out"
        for name in (*OF_THE_MODEL, *OF_THE_EXPERTS)
        if name in known and getattr(flags, name) != known[name]
    ]


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


def departures(flags: FinetuneFlags, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a run departs from what its preset says of fine-tuning, and where from what its method says, here or in pre-training."""
    of_preset, of_method = command_line.departures(flags, _usual_flags(flags, source))
    of_method |= source.operated
    if "preset" not in source.flags or flags.from_scratch:
        return of_preset, of_method
    before = command_line.departures(source.made, command_line.usual_flags(source.made))[1]
    return of_preset, of_method | {f"pretrained_{name}": value for name, value in before.items() if of_method.get(name) != value}


def _usual_flags(flags: FinetuneFlags, source: Source) -> FinetuneFlags:
    """What the preset says of fine-tuning, the method of its experts, and the checkpoint of the model."""
    meant = load(METHODS, "method", flags.method).flags if flags.method else {}
    made = ("dropout", "dropatt", "dynamic_moe_mode")
    sizes = {name: getattr(flags, name) for name in (*OF_THE_MODEL, "method", "moe")}
    sizes |= {name: source.flags.get(name, getattr(flags, name)) for name in made}
    of_surgery = ("moe_num_expert", "moe_experts_by_layer", "moe_expert_rank", "moe_sparse_share")
    values = {**meant, **sizes, **{name: getattr(flags, name) for name in of_surgery}}
    how = finetuning(flags.task, flags.preset, flags.model)
    return FinetuneFlags(**{**values, **how, **_experts(values), "task": flags.task, "dataset": flags.task, "preset": flags.preset})


if __name__ == "__main__":  # python -m utils.finetuning ARGS...: checks a command line of finetune.py and prints what it decides
    with exit_on_user_error():
        print(json.dumps(dataclasses.asdict(parse()[0]), indent=1))
