"""The command line of train.py where it starts from weights: they say what the model is, preset and method how it is trained. Imports no
torch.

Order of precedence: the command line, the checkpoint, the method's flags, the preset. What the checkpoint decides cannot be given
otherwise.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoe_dropout.registry import METHODS, load
from utils import command_line
from utils.command_line import check, from_command_line, named_data, value_of, without_refused
from utils.finetuning import OF_THE_MODEL, contradictions, decided, of_the_checkpoint, preset_of
from utils.flags import Flags
from utils.presets import PRESETS
from utils.source import Source, open_source


def parse(argv: Sequence[str] | None = None) -> tuple[Flags, Source | None]:
    """The flags of a command line, and with --start_from the checkpoint. Raises UserError listing all mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = value_of(argv, "start_from")
    if given is None:
        return command_line.parse(argv), None
    argv, mistakes = without_refused(argv)
    source = open_source(Path(given))
    preset = preset_of(source, argv)
    flags = from_command_line(argv, _defaults(source, preset, argv))
    return decided(flags, source, mistakes + contradictions(flags, source) + check(flags) + _check_teacher(flags)), source


def _check_teacher(flags: Flags) -> list[str]:
    """Of one that has to read what the model reads, with a memory like its own. UserError for one that is not there."""
    if flags.teacher is None:
        return []
    teacher, same = open_source(Path(flags.teacher)), ("model", "n_layer", "d_model", "tgt_len", "mem_len")
    if "preset" not in teacher.flags:
        return [f"--teacher {flags.teacher} holds weights alone: give the folder of the run that made them"]
    found = [f"{name} = {teacher.flags[name]}, not {getattr(flags, name)}" for name in same if teacher.flags[name] != getattr(flags, name)]
    found = [f"--teacher {flags.teacher} has {', '.join(found)}: it has to be of such a model"] if found else []
    return found + ([f"--teacher {flags.teacher} cannot be compiled: leave --compile out"] if flags.compile else [])


def _defaults(source: Source, preset: str, argv: list[str]) -> Flags:
    values = of_the_checkpoint(source, preset, argv)
    kept = ("dataset", "data", "dynamic_moe", "moe_prune_to")
    values |= {name: source.flags[name] for name in kept if name in source.flags} | named_data(argv)
    return Flags(**{**_training(values["model"], values["method"], preset), **values, "preset": preset})


def _training(model: str, method: str | None, preset: str) -> dict[str, Any]:
    """What preset and method say of training."""
    return {**PRESETS[model][preset], **(load(METHODS, "method", method).flags if method else {})}


def departures(flags: Flags, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a run departs from what its preset says, and where from what its method says, or did before."""
    operated = ("moe_num_expert", "moe_experts_by_layer", "moe_expert_rank", "moe_sparse_share") if source.surgery else ()
    made = {name: getattr(flags, name) for name in (*OF_THE_MODEL, "method", "moe", *operated)}
    usual = Flags(**{**_training(flags.model, flags.method, flags.preset), **made, "preset": flags.preset})
    of_preset, of_method = command_line.departures(flags, usual)
    taught = {"teacher_weight": flags.teacher_weight, "teacher_temperature": flags.teacher_temperature} if flags.teacher else {}
    return of_preset, of_method | source.operated | taught
