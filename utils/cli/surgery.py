"""The command line of surgery.py: which trained model is made smaller, how, and what is read to decide. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from smoe_dropout.registry import SURGERIES, unknown
from utils.checkpoints.origin import SURGERY, Source, kind_of, open_source, with_current_names
from utils.cli import finetune
from utils.data.corpus import Corpus
from utils.data.rows import KINDS, TASKS, Examples, read_examples
from utils.errors import UserError, exit_on_user_error
from utils.flags.derive import read_config, resolve
from utils.flags.fields import CHOICES, OF_PIECES, FinetuneFlags, Flags


@dataclass(frozen=True)
class SurgeryFlags:
    """Makes a smaller model of a trained one with experts, and measures both."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """a finished run of train.py, one of its checkpoints/step-*, or a folder of this program"""
    method: str
    """merge, uncurl, keep_best, drop, average or compress"""
    keep: int | None = None
    """experts to keep in a layer; merge, average and drop keep so many on average over the layers, unless --by_layer"""
    by_layer: bool = False
    """merge, average, drop: keep as many in every layer"""
    score: str | None = None
    """keep_best: score of an expert, usage, gate_weight or router_norm"""
    rank: int | None = None
    """compress: rank of U V in W = U V + S"""
    kept: float | None = None
    """compress: share of the hidden units that S has after training"""
    calibrate: str | None = None
    """what is read to decide: a prepared text, or with --task the task's rows; default the run's own text, or data/<task>"""
    task: str | None = None
    """read the rows of sst2, csqa, asdiv_a, mawps or svamp instead of a text; padding is not counted"""
    fold: int | None = None
    """with --task asdiv_a or mawps: the fold whose rows are not read, the one to be held out in fine-tuning; default 0"""
    k: int | None = None
    """active experts while reading; default E/2: with all of them active usage says nothing"""
    tokens: int = 65_536
    """positions to read"""
    seed: int = 1111
    """random seed of samples and clusters"""
    data: str | None = None
    """prepared text on which both models are tested; default the run's own"""
    out: str | None = None
    """the folder to make; default runs/<preset>/surgery/<run>-<method>-<keep>, followed by the options and the task"""
    max_test_steps: int | None = None
    """batches of each test (-1: all); default the run's"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda"""
    threads: int = 0
    """CPU threads; 0: torch's choice"""


COMPRESS = "compress"
# of a run's flags, what says nothing of a model that is trained like its own
OF_ONE_RUN = ("work_dir", "run_name", "yes", "start_from", "teacher", "eval_only", "k", "moe_experts_by_layer")
TO_THE_END = ("dynamic_overall_steps", "swad_end")
# of a run's flags, how it was trained from weights: the model itself needs none of them
OF_STARTING = ("start_from", "teacher", "teacher_weight", "teacher_temperature", "moe_prune_to")
# which methods a flag means something to; and those that mean nothing where nothing is read
OPTIONS = {"by_layer": ("merge", "average", "drop"), "score": ("keep_best",), "rank": (COMPRESS,), "kept": (COMPRESS,)}
OF_READING = ("calibrate", "task", "fold", "k")
SCORES = ("usage", "gate_weight", "router_norm")
ROUTER_ALONE = SCORES[2]  # nothing is read for it


@dataclass(frozen=True)
class Plan:
    """flags: the command line, decided. source: the trained model. made: the flags that describe it here. text: on which it is tested.
    material: what is read to decide, a text or the rows of a task; rows: how these are read; both None where nothing is.
    """

    flags: SurgeryFlags
    source: Source
    made: Flags
    text: Corpus
    material: Corpus | Examples | None
    rows: FinetuneFlags | None

    @property
    def options(self) -> dict[str, Any]:
        """Those of the method, where they are given."""
        return {name: getattr(self.flags, name) for name in OPTIONS if getattr(self.flags, name) != getattr(SurgeryFlags, name)}

    @property
    def words(self) -> str:
        """This operation in the words of a table."""
        flags = self.flags
        words = [flags.method, f"{self.made.moe_num_expert} to {flags.keep}" if flags.keep else ""]
        words += [name if value is True else f"{name} {value}" for name, value in self.options.items()]
        words += [f"on {flags.task}" if flags.task else "", f"without fold {flags.fold}" if flags.fold is not None else ""]
        return " ".join(word for word in words if word)

    @property
    def earlier(self) -> dict[str, Any]:
        """What surgery.json says of the operations before this one. A chain of them is told as one, done on the first one's model."""
        return self.source.surgery or {}

    @property
    def first(self) -> dict[str, Any]:
        """The trained model that the first operation of the chain was done on."""
        source, made = self.source, self.made
        own = {"title": source.title, "sha256": source.fingerprint, "method": made.method or "custom", "seed": made.seed}
        return self.earlier.get("source", own)

    @property
    def label(self) -> str:
        """All operations of the chain, and the training between them."""
        return f"{self.source.title}, {self.words}".removeprefix(f"{self.first['title']}, ")

    @property
    def said(self) -> dict[str, Any]:
        """What decides the outcome."""
        flags, material = self.flags, self.material
        read = None
        if material is not None:
            read = {"data": material.title, "fingerprint": material.fingerprint, "task": flags.task, "k": flags.k, "tokens": flags.tokens}
            if flags.fold is not None:
                read["fold"] = flags.fold
        elif self.earlier:
            read = self.earlier.get("read")
        decided = {"method": flags.method, "keep": flags.keep, "options": self.options, "seed": flags.seed}
        decided |= {"source": self.first, "weights_sha256": self.source.fingerprint}
        return decided | {"read": read, "tested_on": self.text.fingerprint, "max_test_steps": self.made.max_test_steps}


def parse(argv: list[str]) -> Plan:
    """A command line and what it names, opened. UserError for every mistake, before anything is written."""
    flags = tyro.cli(SurgeryFlags, args=argv, prog="surgery.py", config=(tyro.conf.HelptextFromCommentsOff,))
    source = open_source(Path(flags.source))
    if mistakes := not_operable(source) or _mistakes(flags, source):
        raise UserError("; ".join(mistakes) + " (nothing was started; --help lists all flags)")
    made = source.made
    if flags.task is not None and KINDS[flags.task].folds > 1:
        flags = dataclasses.replace(flags, fold=flags.fold or 0)
    flags = dataclasses.replace(flags, k=flags.k or max(1, made.moe_num_expert // 2), out=flags.out or _default_folder(flags, source))
    said = {"device": flags.device, "threads": flags.threads, "data": flags.data or made.data, "work_dir": flags.out}
    if flags.max_test_steps is not None:
        said["max_test_steps"] = flags.max_test_steps
    made = dataclasses.replace(made, **said, **{name: getattr(Flags, name) for name in OF_STARTING})
    refuse_occupied(Path(flags.out))
    text = open_text(made.data, source)
    if source.surgery and source.surgery.get("tested_on", text.fingerprint) != text.fingerprint:
        raise UserError(f"{source.path} was tested on another text than {made.data}: give the one it was tested on with --data")
    tested = source.surgery.get("max_test_steps", made.max_test_steps) if source.surgery else made.max_test_steps
    if tested != made.max_test_steps:
        raise UserError(f"--max_test_steps {made.max_test_steps}: {source.path} was tested with {tested}, and has to be after this, too")
    if not reads(flags):
        return Plan(flags, source, made, text, None, None)
    if flags.task is None:
        return Plan(flags, source, made, text, text if flags.calibrate is None else open_text(flags.calibrate, source), None)
    how = ["--task", flags.task, "--checkpoint", flags.source, "--threads", str(flags.threads), "--device", flags.device]
    how += ["--data", flags.calibrate] if flags.calibrate else []
    rows, _ = finetune.parse([*how, "--fold", str(flags.fold or 0)])
    return Plan(flags, source, made, text, read_examples(flags.task, Path(rows.data), rows.fold), rows)


def reads(flags: SurgeryFlags) -> bool:
    """Whether a text or a task's rows decide."""
    return flags.method != COMPRESS and flags.score != ROUTER_ALONE


def not_operable(source: Source) -> list[str]:
    """What is missing of a run with experts."""
    if "preset" not in source.flags:
        return [f"{source.path} holds weights alone: give the folder of the run that made them"]
    return [] if source.flags["moe"] else [f"the checkpoint {source.path} is of {kind_of(source)}: there are none to make fewer"]


def _mistakes(flags: SurgeryFlags, source: Source) -> list[str]:
    E, found = source.flags["moe_num_expert"], []
    if flags.method not in (*SURGERIES, COMPRESS):
        return ["--method: " + unknown("method", flags.method, [*SURGERIES, COMPRESS])]
    for name, methods in OPTIONS.items():
        if flags.method not in methods and getattr(flags, name) != getattr(SurgeryFlags, name):
            found.append(f"--{name} means nothing to --method {flags.method}: leave it out")
    if flags.score is not None and flags.score not in SCORES:
        found.append("--score: " + unknown("score", flags.score, SCORES))
    if source.flags["moe_expert_rank"] is not None:
        found.append(f"{source.path} has compressed experts: operate on the model as it was before, and compress last")
    if not reads(flags):
        alone = f"--method {COMPRESS}" if flags.method == COMPRESS else f"--score {ROUTER_ALONE}"
        unread = [*OF_READING, *(["keep"] if flags.method == COMPRESS else [])]
        found += [f"--{name} means nothing to {alone}: leave it out" for name in unread if getattr(flags, name) is not None]
    if flags.method == COMPRESS:
        most = min(source.flags["d_model"], source.flags["d_inner"])
        if flags.rank is None or not 1 <= flags.rank <= most:
            found.append(f"--rank {flags.rank} must be from 1 to {most}, the largest rank of an expert's maps")
        if flags.kept is None or not 0 < flags.kept <= 1:
            found.append(f"--kept {flags.kept} must be above 0, and 1 at most")
    elif flags.keep is None:
        found.append(f"--keep is missing: say how many of the {E} experts of a layer are to be kept")
    for name in ("keep", "k"):
        if getattr(flags, name) is not None and not 1 <= getattr(flags, name) <= E:
            found.append(f"--{name} {getattr(flags, name)} must be from 1 to the {E} experts of {source.path}")
    if flags.task is not None and flags.task not in TASKS:
        found.append("--task: " + unknown("task", flags.task, list(TASKS)))
    elif flags.fold is not None:
        folds = KINDS[flags.task].folds if flags.task else 1
        if folds == 1:
            found.append(f"--fold {flags.fold}: {flags.task or 'a text'} has no folds, leave it out")
        elif not 0 <= flags.fold < folds:
            found.append(f"--fold {flags.fold}: {flags.task} has the folds 0 to {folds - 1}")
    if flags.device not in CHOICES["device"]:
        found.append("--device: " + unknown("value", flags.device, list(CHOICES["device"])))
    if flags.tokens < 1:
        found.append(f"--tokens {flags.tokens} must be at least 1")
    found += [f"--{name} {getattr(flags, name)} must not be negative" for name in ("seed", "threads") if getattr(flags, name) < 0]
    return found + (_of_lost_width(source) if flags.method != COMPRESS else [])


def _of_lost_width(source: Source) -> list[str]:
    """Where the layers without experts would follow the number of experts."""
    wide = source.flags["model"] in OF_PIECES or source.flags["dense_width"] == "all"
    if not wide or source.flags["moe_index"] is None:
        return []
    return [f"{source.path} has layers without experts, as wide as the experts of a layer together: their width would be lost"]


def _default_folder(flags: SurgeryFlags, source: Source) -> str:
    words = [source.path.resolve().name, flags.method, *(str(size) for size in (flags.keep, flags.rank, flags.kept, flags.score) if size)]
    words += ["by-layer" if flags.by_layer else None, flags.task, f"fold{flags.fold}" if flags.fold is not None else None]
    return f"runs/{source.flags['preset']}/surgery/{'-'.join(word for word in words if word)}"


def refuse_occupied(out: Path) -> None:
    """UserError for a folder that holds anything but an operation, finished or cut short."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose another")
    if out.exists() and any(out.iterdir()) and "surgery" not in (read_config(out) if (out / "config.json").exists() else {}):
        raise UserError(f"--out {out} holds something else: choose an empty or a new folder")


def open_text(folder: str, source: Source) -> Corpus:
    """UserError for a text that is not there, is damaged, or is none that the model can read."""
    corpus = Corpus.open(folder, "pieces" if source.flags["model"] in OF_PIECES else "bytes")
    known, there = source.flags.get("vocabulary_sha256"), corpus.vocabulary
    if (there and there.sha256) != known:
        units = "bytes" if known is None else "the word pieces"
        raise UserError(f"{folder} does not hold {units} that {source.path} was trained on: give another text")
    corpus.verify()
    return corpus


def is_complete(plan: Plan) -> bool:
    """Whether this very operation is there already. UserError for another one."""
    path = Path(plan.flags.out) / SURGERY
    if not path.exists():
        return False
    stored, said = with_current_names(json.loads(path.read_text())), plan.said
    if different := [name for name in said if stored.get(name) != said[name]]:
        raise UserError(f"--out {plan.flags.out} holds another operation, of other {', '.join(different)}: choose another folder")
    return True


def flags_after(plan: Plan, sizes: tuple[int, ...]) -> Flags:
    """Of the model with so many experts in its layers; k and its schedule as its method has them at that size."""
    made, flags = plan.made, plan.flags
    changes = {"moe_num_expert": max(sizes), "moe_experts_by_layer": ",".join(map(str, sizes))}
    if flags.method == COMPRESS:
        changes |= {"moe_expert_rank": flags.rank, "moe_prune_to": flags.kept}
    return dataclasses.replace(resized(made, **changes), method=made.method)


def resized(made: Flags, **changes: object) -> Flags:
    """With another number of experts of the same width; k and its schedule as the method has them at that size."""
    return resolve(dataclasses.replace(made, **dict.fromkeys(("d_ff", "moe_top_k", "moe_top_k_min", "moe_top_k_max")), **changes))


def like(run: str, keep: str) -> list[str]:
    """The command line of a model trained like a run's, from random weights, with `keep` experts in every layer. UserError for a run
    that no surgery leaves so many experts of.
    """
    source = open_source(Path(run))
    no_number = [] if keep.isdecimal() else [f"{keep} is no number of experts to keep"]
    if mistakes := not_operable(source) or no_number + _of_lost_width(source):
        raise UserError("; ".join(mistakes))
    made = source.made
    if not 1 <= int(keep) <= made.moe_num_expert:
        raise UserError(f"{keep} experts must be from 1 to the {made.moe_num_expert} of {run}")
    flags = resized(made, moe_num_expert=int(keep), moe_experts_by_layer=None)
    words = []
    for name, value in dataclasses.asdict(flags).items():
        if name in source.flags and name not in OF_ONE_RUN and value is not None:
            value = -1 if name in TO_THE_END and value == flags.max_step else value  # as long as training, should that be changed
            words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


if __name__ == "__main__":  # python -m utils.cli.surgery RUN KEEP: the words of `like`, one a line
    with exit_on_user_error():
        print("\n".join(like(*sys.argv[1:])))
