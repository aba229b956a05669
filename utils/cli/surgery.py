"""The command line of surgery.py: the trained model, the operation, and the calibration data. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoints.origin import Source, kind_of, open_run, read_surgery
from utils.checkpoints.run_files import BEGUN, CONFIG, SURGERY, read_config
from utils.cli import finetune
from utils.cli.arguments import Values
from utils.cli.pipeline import Program, decide, lost_width
from utils.data.corpus import Corpus
from utils.data.rows import TASKS, Examples, read_examples
from utils.data.rows import kind_of as task_kind
from utils.errors import UserError, refuse_unwritable
from utils.flags.check import is_given, no_effect
from utils.flags.derive import resized
from utils.flags.fields import AVERAGING, COMPRESS, ROUTER_NORM, FinetuneFlags, Flags, SurgeryFlags, names
from utils.flags.models import MODELS
from utils.training.identity import operations_of, training_of


@dataclass(frozen=True)
class Plan:
    """An operation, its inputs opened.

    flags: decided flags of the command line. source: the trained model. made: the flags that describe it. text: the test text.
    material: calibration data, a text or the rows of a task; rows: the flags to read rows with; both None if there are none.
    """

    flags: SurgeryFlags
    source: Source
    made: Flags
    text: Corpus
    material: Corpus | Examples | None
    rows: FinetuneFlags | None

    @property
    def options(self) -> dict[str, Any]:
        """The options given to the method."""
        return {name: getattr(self.flags, name) for name in names(role="option", kind=SurgeryFlags) if is_given(self.flags, name)}

    @property
    def earlier(self) -> dict[str, Any]:
        """The measurements of the operations before this one. A chain is measured as one operation on the first model."""
        return self.source.surgery or {}

    @property
    def operation(self) -> dict[str, Any]:
        """This operation as values."""
        flags, material = self.flags, self.material
        sizes = {"from": self.made.moe_num_expert, "keep": flags.keep} if flags.keep else {}
        values = {"method": flags.method, **sizes, "options": self.options, "seed": flags.seed, "weights_sha256": self.source.fingerprint}
        if material is not None:
            amount = {"tokens": flags.tokens} if flags.tokens else {"examples": flags.examples}
            read = {"data": material.title, "fingerprint": material.fingerprint, "task": flags.task, "k": flags.k} | amount
            values["read"] = read | ({"fold": flags.fold} if flags.fold is not None else {})
        return values

    @property
    def provenance(self) -> dict[str, Any]:
        """The part of surgery.json that is known before anything is measured."""
        source = self.source
        operated = {"trained": training_of(source), "operations": [*operations_of(source), self.operation]}
        operated["source_sha256"] = self.earlier.get("source_sha256", source.fingerprint)
        return operated | {"tested_on": self.text.fingerprint, "max_test_steps": self.made.max_test_steps}


def parse(argv: Sequence[str] | None = None) -> Plan:
    """The plan of a command line, its inputs opened. Raises UserError for every mistake, before anything is written."""
    flags, source = decide(PROGRAM, argv)
    made = source.made
    if flags.task is not None and task_kind(flags.task).folds > 1:
        flags = dataclasses.replace(flags, fold=flags.fold or 0)
    flags = dataclasses.replace(flags, k=flags.k or max(1, made.moe_num_expert // 2), out=flags.out or _default_folder(flags, source))
    given = {"device": flags.device, "threads": flags.threads, "data": flags.data or made.data, "work_dir": flags.out}
    if flags.max_test_steps is not None:
        given["max_test_steps"] = flags.max_test_steps
    made = dataclasses.replace(made, **given, **{name: getattr(Flags, name) for name in names(role="start")})
    refuse_unwritable("--out", flags.out)
    refuse_occupied(Path(flags.out))
    text = open_text(made.data, source)
    earlier = source.surgery or {}
    if earlier.get("tested_on", text.fingerprint) != text.fingerprint:
        raise UserError(f"{source.path} was tested on another text than {made.data}: give the one it was tested on with --data")
    tested = earlier.get("max_test_steps", made.max_test_steps)
    if tested != made.max_test_steps:
        raise UserError(f"--max_test_steps {made.max_test_steps}: {source.path} was tested with {tested}, use the same")
    if not reads(flags):
        return Plan(flags, source, made, text, None, None)
    if flags.task is None:
        material = text if flags.calibrate is None else open_text(flags.calibrate, source)
        _refuse_surplus(flags, len(material.train), material)
        return Plan(flags, source, made, text, material, None)
    given = {"task": flags.task, "checkpoint": flags.source, "fold": flags.fold or 0, "threads": flags.threads, "device": flags.device}
    rows, _ = finetune.parse(Values(given | ({"data": flags.calibrate} if flags.calibrate else {})))
    material = read_examples(flags.task, Path(rows.data), rows.fold)
    _refuse_surplus(flags, len(material.train) * rows.max_length, material)
    return Plan(flags, source, made, text, material, rows)


def _refuse_surplus(flags: SurgeryFlags, positions: int, material: Corpus | Examples) -> None:
    """Raises UserError for more positions than there are to read."""
    if flags.tokens is not None and flags.tokens > positions:
        raise UserError(f"--tokens {flags.tokens} is more than the {positions} positions of {material.path}: give at most that many")


def reads(flags: SurgeryFlags) -> bool:
    """Return whether the operation needs calibration data."""
    return flags.method != COMPRESS and flags.score != ROUTER_NORM


def _mistakes(flags: SurgeryFlags, source: Source) -> list[str]:
    if not source.flags["moe"]:
        return [f"the checkpoint {source.path} is of {kind_of(source)}: it has no experts to remove"]
    made, found = source.made, []
    E = made.moe_num_expert
    if made.moe_expert_rank is not None:
        found.append(f"{source.path} has compressed experts: operate on the model before compression, and compress last")
    if not reads(flags):
        cause = f"--method {COMPRESS}" if flags.method == COMPRESS else f"--score {ROUTER_NORM}"
        found += [no_effect(name, cause) for name in names(role="calibration", kind=SurgeryFlags) if is_given(flags, name)]
    if flags.method == COMPRESS:
        largest = min(made.d_model, made.d_inner)
        if not 1 <= (flags.rank or 0) <= largest:
            fault = "is missing: it" if flags.rank is None else str(flags.rank)
            found.append(f"--rank {fault} must be from 1 to {largest}, the full rank of an expert's weight matrices")
        if flags.kept is None:
            found.append("--kept is missing: give the share of the hidden units to leave in S")
    elif flags.keep is None:
        found.append(f"--keep is missing: give the number of the {E} experts of a layer to keep")
    elif flags.at_least is not None:
        if flags.by_layer or not (flags.pooled or flags.method in AVERAGING):
            found.append(no_effect("at_least", "the same number of experts in every layer"))
        elif flags.at_least > flags.keep:
            found.append(f"--at_least {flags.at_least} must be at most --keep {flags.keep}, the number of experts of a layer on average")
    found += [
        f"--{name} {value} must be from 1 to the {E} experts of {source.path}"
        for name, value in (("keep", flags.keep), ("k", flags.k))
        if value is not None and not 1 <= value <= E
    ]
    if flags.tokens is not None and is_given(flags, "examples"):
        found.append("--tokens and --examples both say how much to read: leave one out")
    if flags.fold is not None and flags.task in (None, *TASKS):
        folds = task_kind(flags.task).folds if flags.task else 1
        if folds == 1:
            found.append(f"--fold {flags.fold}: {flags.task or 'a text'} has no folds, leave it out")
        elif flags.fold >= folds:
            found.append(f"--fold {flags.fold}: {flags.task} has the folds 0 to {folds - 1}")
    return found + (lost_width(source) if flags.method != COMPRESS else [])


PROGRAM = Program("surgery.py", SurgeryFlags, "from", True, open_run, mistakes=_mistakes)


def _default_folder(flags: SurgeryFlags, source: Source) -> str:
    words = [source.path.resolve().name, flags.method, *(str(size) for size in (flags.keep, flags.rank, flags.kept, flags.score) if size)]
    words += ["by-layer" if flags.by_layer else "pooled" if flags.pooled else None, f"at-least{flags.at_least}" if flags.at_least else None]
    words += [flags.task, f"fold{flags.fold}" if flags.fold is not None else None]
    return f"runs/{source.flags['preset']}/surgery/{'-'.join(word for word in words if word)}"


def refuse_occupied(out: Path) -> None:
    """Raises UserError for a folder that holds anything but an operation, finished or interrupted."""
    found = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if found - BEGUN and "surgery" not in (read_config(out) if CONFIG in found else {}):
        raise UserError(f"--out {out} holds something else: choose an empty or a new folder")


def open_text(folder: str, source: Source) -> Corpus:
    """Raises UserError for a text that is missing, damaged, or not in the model's vocabulary."""
    corpus = Corpus.open(folder, MODELS[source.made.model].reads)
    known, found = source.flags.get("vocabulary_sha256"), corpus.vocabulary
    if (found and found.sha256) != known:
        units = "bytes" if known is None else f"the {corpus.unit_in_words}"
        raise UserError(f"{folder} does not hold {units} that {source.path} was trained on: give another text")
    corpus.verify()
    return corpus


def is_complete(plan: Plan) -> bool:
    """Return whether --out already holds this operation, measured. Raises UserError if it holds another one."""
    out = Path(plan.flags.out)
    if not (out / SURGERY).exists():
        return False
    stored, asked = read_surgery(out), plan.provenance
    (*_, found), (*_, expected) = stored["operations"], asked["operations"]
    different = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    different += [name for name in ("tested_on", "max_test_steps") if stored.get(name) != asked[name]]
    if different:
        raise UserError(f"--out {out} holds another operation, of other {', '.join(different)}: choose another folder")
    return True


def flags_after(plan: Plan, sizes: tuple[int, ...]) -> Flags:
    """The flags of the smaller model. sizes: experts of each MoE layer. k and its schedule are the method's for that number of experts."""
    made, flags = plan.made, plan.flags
    changes = {"moe_num_expert": max(sizes), "moe_experts_by_layer": ",".join(map(str, sizes))}
    if flags.method == COMPRESS:
        changes |= {"moe_expert_rank": flags.rank, "moe_prune_to": flags.kept}
    if flags.method in ("merge", COMPRESS) and not made.freeze_gate:  # MC-SMoE recovers with frozen routers, which need no balance
        changes |= {"freeze_gate": True, "load_balance": 0.0}
    return dataclasses.replace(resized(made, **changes), method=made.method)
