"""From a command line to decided flags, for train.py, finetune.py, surgery.py, generate.py and convert.py. Imports no torch.

    command line -> defaults -> inherit -> parse -> check -> decide

Precedence, highest first:
1. the command line
2. the checkpoint: --start_from, --settings_from or --checkpoint; with --eval_only the run in --work_dir
3. the method (smoe_dropout/methods)
4. the preset (utils/flags/presets.py), for pre-training or for fine-tuning
5. the declared default (utils/flags/fields.py)

Flags that define the meaning of the checkpoint's weights cannot be changed (`contradictions`). `-` and `_` are the same in names.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smoe_dropout.files import read_object
from smoe_dropout.options import ConfigError
from utils.checkpoints.origin import Source, open_source
from utils.checkpoints.run_files import CONFIG, read_config
from utils.cli.arguments import Arguments, Values
from utils.errors import UserError, refuse_unwritable
from utils.flags.check import check, check_limits, refuse
from utils.flags.declare import FlagsT, flags_from
from utils.flags.derive import built_options, idle, parse_ks, resolve, training_flags
from utils.flags.fields import Flags, defaults_before, names
from utils.flags.memory import refuse_if_too_large
from utils.flags.models import MODELS, presets_of
from utils.flags.official import REFUSED

CHECKPOINT_FLAGS = names(role="model") + names(role="experts")  # what the weights mean


class Program(NamedTuple):
    """A program as the pipeline sees it.

    source_flag: the flag that names a checkpoint or model. required: refuse to run without it. open: opens it. defaults: values for
    the flags that are not given. mistakes: checks of this program only; their source is None without a checkpoint, and with --eval_only.
    refused: flags with the reason why they are refused.
    """

    name: str
    flags: type
    source_flag: str
    required: bool = False
    open: Callable[[Path], Source] = open_source
    defaults: Callable[[Any, Source | None], dict[str, Any]] = lambda command, source: {}
    mistakes: Callable[[Any, Source | None], list[str]] = lambda flags, source: []
    refused: Mapping[str, str] = REFUSED


def decide(program: Program, given: Sequence[str] | Values | None = None) -> tuple[Any, Source | None]:
    """The decided flags, and the checkpoint if there is one. Raises UserError listing all mistakes.

    given: an argument vector, by default the process's, or flags as values.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads of torch do not spin, which would slow down whatever runs beside it
    argv = sys.argv[1:] if given is None else given
    command = given if isinstance(given, Values) else Arguments(program.name, argv, program.refused)
    if command.asks_for_help and program.required:
        command.over(program.flags, {})
    trains = issubclass(program.flags, Flags)
    if trains and command.has("eval_only"):
        return _stored_run(program, command), None
    path = command.get(program.source_flag)
    if path is None and program.required:
        raise UserError(f"--{program.source_flag} is missing: give the folder of a finished run of train.py")
    source = None if path is None else program.open(Path(path))
    flags = command.over(program.flags, program.defaults(command, source))
    refuse([*command.mistakes, *(check if trains else check_limits)(flags), *program.mistakes(flags, source)])
    if not trains:
        return flags, source
    flags = as_begun(resolve(flags), command)
    if source and source.flags.get("method", "") is None:  # a custom run stays custom even if its flags match a method
        flags = dataclasses.replace(flags, method=None)
    refuse_if_too_large(flags)
    refuse_unwritable("--work_dir", flags.work_dir)
    return flags, source


def _stored_run(program: Program, command: Arguments) -> Flags:
    """With --eval_only: the flags of the run in --work_dir, under the command line."""
    folder = command.get("work_dir")
    if folder is None:
        raise UserError("--eval_only needs --work_dir, the folder of the run to evaluate")
    stored = read_config(Path(folder))
    if ("task" in stored) != ("task" in program.flags.__dataclass_fields__):
        other = "finetune.py" if "task" in stored else "train.py"
        raise UserError(f"{folder} is a run of {other}: evaluate it with python {other} --eval_only")
    flags = command.over(program.flags, vars(flags_from(stored, program.flags)))
    own = [
        name for name in names(kind=program.flags) if name not in names(role="evaluation") and {name, f"no_{name}"} & command.given.keys()
    ]
    why = {True: "only for training, not for", False: "the run's own with"}
    own = [f"--{name} is {why[name in names(role='unstored')]} --eval_only: leave it out" for name in own]
    refuse([*command.mistakes, *own])
    refuse([*check(flags), *program.mistakes(flags, None)])
    if flags.k is not None:
        if not flags.moe:
            raise UserError(f"--k {flags.k}: the run in {folder} is dense; leave it out")
        parse_ks(flags.k, flags.moe_num_expert)
    refuse_unwritable("--work_dir", folder)
    return flags


def as_begun(flags: FlagsT, command: Arguments | Values) -> FlagsT:
    """The flags. Those not given that --work_dir was begun without, in an earlier version, are as they were by default then."""
    try:
        stored = read_object(Path(flags.work_dir) / CONFIG)
    except ConfigError:  # no run, or a damaged one, which is refused elsewhere
        return flags
    earlier = {name: value for name, value in defaults_before(type(flags)).items() if name not in stored and not command.has(name)}
    begun = dataclasses.replace(flags, **earlier)
    told = [name for name, value in earlier.items() if value != getattr(flags, name) and name not in idle(flags)]
    if told and (told != ["defaults"] or built_options(begun) != built_options(flags)):
        kept = ", ".join(f"--{name} {earlier[name]}" for name in told)
        print(f"note: {flags.work_dir} was begun by an earlier version, so it keeps {kept}", file=sys.stderr)
    return begun


def refuse_other_data(flags: Flags, data: Any) -> None:
    """Raises UserError if --eval_only would score on another data set, a Corpus or Examples, than the run's."""
    if flags.eval_only and read_config(Path(flags.work_dir)).get("data_fingerprint", data.fingerprint) != data.fingerprint:
        raise UserError(f"{flags.data} does not hold the {data.unit} of the run in {flags.work_dir}: give the folder that does with --data")


def inherited(command: Arguments | Values, source: Source | None) -> dict[str, Any]:
    """Preset and method of pre-training, overridden by the flags of the checkpoint for its model, experts and training.

    Unknown names stay as they are, for `check` to report.
    """
    known = source.flags if source else {}
    model = known.get("model") or command.get("model") or Flags.model
    method = known.get("method") or command.get("method")
    preset = command.get("preset") or known.get("preset") or Flags.preset
    known_model = model if model in MODELS else Flags.model
    values = training_flags(known_model, method, preset if preset in presets_of(known_model) else Flags.preset)
    values |= {name: known[name] for name in CHECKPOINT_FLAGS + names(role="training") if name in known}
    return values | {"model": model, "method": method, "preset": preset}


def lost_width(run: Source) -> list[str]:
    """A mistake if another number of experts would change the width of layers without experts."""
    made = run.made
    wide = "dense_width" in MODELS[made.model].unknown_flags or made.dense_width == "all"
    if not wide or made.moe_index is None:
        return []
    return [f"{run.path} has layers without experts, as wide as all experts of a layer together: their width would be lost"]


def dataset_of(command: Arguments | Values) -> dict[str, str]:
    """The data set is named after the --data folder, unless --dataset names it."""
    data = command.get("data")
    return {"dataset": Path(data).name} if data else {}


def contradictions(flags: Flags, source: Source, fixed: tuple[str, ...]) -> list[str]:
    """Flags that differ from those of the checkpoint."""
    known = source.flags
    return [
        f"--{name} {getattr(flags, name)}, but the checkpoint {source.path} has {name} = {known[name]}: leave it out"
        for name in fixed
        if name in known and getattr(flags, name) != known[name]
    ]
