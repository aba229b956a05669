"""The command line of train.py. Imports no torch.

`python -m utils.cli.train ARGS` checks a command line and prints the decided flags as JSON.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.checkpoints.origin import Source, open_run, open_source
from utils.cli.arguments import Arguments
from utils.cli.pipeline import CHECKPOINT_FLAGS, Program, contradictions, dataset_of, decide, inherited, lost_width
from utils.data.attack import attack_of
from utils.data.corpus import Corpus
from utils.data.lanes import Lanes
from utils.errors import UserError, exit_on_user_error
from utils.flags.derive import method_flags, parse_counts
from utils.flags.fields import SELF, Flags, names
from utils.flags.memory import refuse_if_too_large
from utils.flags.models import MODELS


def parse(argv: Sequence[str] | None = None) -> tuple[Flags, Source | None]:
    """The flags of a command line, and with --start_from the checkpoint. Raises UserError listing all mistakes."""
    return decide(PROGRAM, argv)


def refuse_sizes(flags: Flags, corpus: Corpus) -> None:
    """Raises UserError if a text is too short for the batches, has no rare tokens to treat apart, or cannot be attacked as asked, or if a
    batch is too large for memory.
    """
    attack_of(flags.attack, flags.attack_rate, corpus.vocabulary, corpus.path)
    _refuse_vocabulary(flags, corpus)
    if "bytes" in MODELS[flags.model].reads:
        Lanes(corpus.train, flags.batch_size, flags.tgt_len)
        for held_out in (corpus.valid, corpus.test):
            Lanes(held_out, flags.eval_batch_size, flags.eval_tgt_len, option="--eval_batch_size")
    if not flags.eval_only:
        refuse_if_too_large(flags, len(corpus.train))


def _refuse_vocabulary(flags: Flags, corpus: Corpus) -> None:
    """Raises UserError for --adaptive or --sample_softmax on a text of bytes, and for clusters without tokens."""
    given = "--adaptive" if flags.adaptive else f"--sample_softmax {flags.sample_softmax}" if flags.sample_softmax > 0 else None
    if given and corpus.unit == "bytes":
        raise UserError(f"{given} is for many tokens, and {corpus.path} is a text of bytes, of which there are 256: leave it out")
    if flags.adaptive and parse_counts(flags.cutoffs)[-1] >= (size := corpus.vocabulary.size):
        raise UserError(f"--cutoffs {flags.cutoffs} must end below {size:,}, the number of tokens of {corpus.path}: choose smaller ones")


def _defaults(command: Arguments, source: Source | None) -> dict[str, Any]:
    if command.get("tokens") and command.get("max_step"):
        raise UserError("--tokens and --max_step both say how long to train: leave one out")
    if (run := command.get("settings_from")) and source is None:
        return _settings(open_run(Path(run)), command) | dataset_of(command)
    continued = {name: source.flags[name] for name in names(role="continued") if name in source.flags} if source else {}
    return inherited(command, source) | continued | dataset_of(command)


def _settings(run: Source, command: Arguments) -> dict[str, Any]:
    """All flags of a finished run; those that follow from a flag on the command line are derived again."""
    stored = dataclasses.asdict(run.made)
    dropped = {*names(role="start"), *names(role="unstored")}
    dropped |= {name for name in names(follows="max_step") if stored[name] == stored["max_step"]}  # to the end of training
    for given in ("moe_num_expert", "d_ff", "gate_name"):
        dropped |= {*names(follows=given)} if command.get(given) else set()
    dropped |= {"moe_experts_by_layer"} if command.get("moe_num_expert") else set()
    dropped |= {"data"} if command.get("dataset") else set()
    dropped |= {"tokens"} if command.get("max_step") else set()
    return {**method_flags(run.made.method), **{name: value for name, value in stored.items() if name not in dropped}}


def _mistakes(flags: Flags, source: Source | None) -> list[str]:
    if flags.model in MODELS and MODELS[flags.model].from_folder and flags.start_from is None:
        return [f"--model {flags.model} is built from a folder of transformers: give it with --start_from"]
    if flags.settings_from is not None:
        return _check_settings(flags)
    if source is None:
        return []
    return contradictions(flags, source, CHECKPOINT_FLAGS) + (_check_teacher(flags, source) if flags.model in MODELS else [])


def _check_settings(flags: Flags) -> list[str]:
    if flags.start_from is not None:
        return ["--settings_from starts from random weights, --start_from from trained ones: leave one out"]
    run = open_run(Path(flags.settings_from))
    found = contradictions(flags, run, ("model", "method", "preset"))
    if run.made.moe_expert_rank is not None:
        found.append(f"--settings_from {flags.settings_from} has compressed experts: give the run before compression")
    return found + (lost_width(run) if flags.moe_num_expert != run.made.moe_num_expert else [])


def _check_teacher(flags: Flags, source: Source) -> list[str]:
    """A teacher must read the student's input and carry a memory of the same shape."""
    if flags.teacher is None:
        return []
    if MODELS[flags.model].from_folder:
        return _check_folder_of_teacher(flags, source)
    if flags.teacher == SELF:
        return [f"--teacher {SELF} is for --model hf: give a finished run"]
    teacher = open_run(Path(flags.teacher))
    differing = [name for name in names(role="teacher") if teacher.flags[name] != getattr(flags, name)]
    found = [f"{name} = {teacher.flags[name]}, not {getattr(flags, name)}" for name in differing]
    found = [f"--teacher {flags.teacher} has {', '.join(found)}: choose one of the same shape"] if found else []
    return found + ([f"--teacher {flags.teacher} cannot be combined with --compile: leave one out"] if flags.compile else [])


def _check_folder_of_teacher(flags: Flags, source: Source) -> list[str]:
    if flags.teacher == SELF:
        return [] if flags.moe else [f"--teacher {SELF} predicts with all experts, and {source.path} has none: give another folder"]
    teacher, own = open_source(Path(flags.teacher)), source.flags.get("vocabulary_sha256")
    if teacher.flags.get("vocabulary_sha256") != own or not own:
        return [f"--teacher {flags.teacher} reads other tokens than {source.path}: give a model with the same tokenizer"]
    return []


PROGRAM = Program("train.py", Flags, "start_from", defaults=_defaults, mistakes=_mistakes)

if __name__ == "__main__":
    with exit_on_user_error():
        print(json.dumps(dataclasses.asdict(parse()[0]), indent=1))
