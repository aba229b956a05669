"""The command line of train.py: flags, presets and methods, checked before anything is read. Imports no torch.

Order of precedence: the command line, the method's flags, the preset, the defaults in flags.py. `_` and `-` are alike in names.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from smoe_dropout.registry import METHODS, load, unknown
from utils.checkpoints.origin import Source, open_source
from utils.cli.argv import FlagsOf, from_command_line, named_data, value_of, without_refused
from utils.cli.inherit import contradictions, decided, of_the_checkpoint, preset_of
from utils.errors import UserError, exit_on_user_error
from utils.flags.check import check
from utils.flags.derive import parse_ks, read_config, resolve, training_flags
from utils.flags.fields import (
    Flags,
)
from utils.flags.presets import PRESETS


def parse(argv: Sequence[str] | None = None) -> tuple[Flags, Source | None]:
    """The flags of a command line, and with --start_from the checkpoint. Raises UserError listing all mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = value_of(argv, "start_from")
    if given is None:
        return parse_from_random(argv), None
    argv, mistakes = without_refused(argv)
    source = open_source(Path(given))
    preset = preset_of(source, argv)
    flags = from_command_line(argv, _defaults_of_source(source, preset, argv))
    return decided(flags, source, mistakes + contradictions(flags, source) + check(flags) + _check_teacher(flags)), source


def parse_from_random(argv: list[str]) -> Flags:
    """The flags of a command line, with preset and method filled in and every default decided.

    Raises UserError listing all mistakes; a flag that cannot be parsed ends the process with tyro's message and exit code 2.
    """
    argv, mistakes = without_refused(argv)
    defaults, more = _defaults(argv)
    flags = from_command_line(argv, defaults)
    mistakes += more + check(flags)
    if mistakes:
        raise UserError("; ".join(mistakes) + " (nothing was started; --help lists all flags)")
    return resolve(flags)


def stored_run(argv: Sequence[str] | None = None, kind: type[FlagsOf] = Flags, program: str = "train.py") -> FlagsOf | None:
    """With --eval_only, the flags of the run in --work_dir with the command line laid over them; else None. Raises UserError as `parse`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not {"--eval_only", "--eval-only"} & set(argv):
        return None
    folder = value_of(argv, "work_dir")
    if folder is None:
        raise UserError("--eval_only needs --work_dir, the folder of the run to evaluate")
    stored = read_config(Path(folder))
    names = {field.name for field in dataclasses.fields(kind)}
    if ("task" in stored) != ("task" in names):
        other = "finetune.py" if "task" in stored else "train.py"
        raise UserError(f"{folder} is a run of {other}: evaluate it with python {other} --eval_only")
    flags = from_command_line(argv, kind(**{name: value for name, value in stored.items() if name in names}), program)
    if mistakes := check(flags):
        raise UserError("; ".join(mistakes))
    if flags.k is not None:
        if not flags.moe:
            raise UserError(f"--k {flags.k}: the run in {folder} is dense; leave it out")
        parse_ks(flags.k, flags.moe_num_expert)
    return flags


def _defaults(argv: list[str]) -> tuple[Flags, list[str]]:
    model, preset = (value_of(argv, name) or getattr(Flags, name) for name in ("model", "preset"))
    method, mistakes = value_of(argv, "method"), []
    if method is not None and method not in METHODS:
        mistakes.append("--method: " + unknown("method", method, METHODS))
        method = None
    meant = load(METHODS, "method", method).flags if method else {}
    presets = PRESETS.get(model, PRESETS[Flags.model])
    values = {**presets.get(preset, presets[Flags.preset]), **named_data(argv), **meant}
    return Flags(**{**values, "model": model, "preset": preset}), mistakes


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


def _defaults_of_source(source: Source, preset: str, argv: list[str]) -> Flags:
    values = of_the_checkpoint(source, preset, argv)
    kept = ("dataset", "data", "dynamic_moe", "moe_prune_to")
    values |= {name: source.flags[name] for name in kept if name in source.flags} | named_data(argv)
    return Flags(**{**training_flags(values["model"], values["method"], preset), **values, "preset": preset})


if __name__ == "__main__":  # python -m utils.cli.train ARGS...: checks a command line of train.py and prints what it decides
    with exit_on_user_error():
        print(json.dumps(dataclasses.asdict(parse()[0]), indent=1))
