"""Sets up runs: pre-training from random weights or from a checkpoint, and fine-tuning."""

from smoe_dropout.registry import load
from utils.checkpoints.origin import Source
from utils.data.corpus import Corpus
from utils.data.rows import Examples, kind_of
from utils.data.tokens import FILE as TOKENIZER_FILE
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import SELF, FinetuneFlags, Flags
from utils.flags.models import MODELS
from utils.tasks.base import Task
from utils.tasks.encoding import encoder_of
from utils.tasks.labelled import LabelledTask
from utils.training.export import Export
from utils.training.pruning import Pruning
from utils.training.run import Run
from utils.training.teacher import SelfTeacher, Teacher


def pretraining_task(flags: Flags, corpus: Corpus, engine: Engine) -> Task:
    """UserError for a corpus the model cannot read, or one that is too short."""
    return load({flags.model: MODELS[flags.model].pretraining}, "model", flags.model)(flags, corpus, engine)


def finetuning_task(flags: FinetuneFlags, examples: Examples, engine: Engine, source: Source) -> LabelledTask:
    """UserError for a tokenizer that is not the checkpoint's, and for rows that do not fit the flags."""
    task = kind_of(flags.task).task
    return load({flags.task: task}, "task", flags.task)(flags, examples, engine, encoder_of(flags, source))


def pretraining_run(flags: Flags, corpus: Corpus, engine: Engine, source: Source | None = None) -> Run:
    """Pre-training from random weights or a checkpoint. UserError for a text of another vocabulary than the checkpoint's."""
    task, callbacks = pretraining_task(flags, corpus, engine), []
    known, found = source.flags.get("vocabulary_sha256") if source else None, task.vocabulary.sha256 if task.vocabulary else None
    from_folder = MODELS[flags.model].from_folder
    if source and found != known and (known or ("preset" in source.flags and not from_folder)):
        other = f"{source.path / TOKENIZER_FILE} makes other" if from_folder else f"{source.path} was trained on other"
        raise UserError(f"{other} {corpus.unit_in_words} than those of {corpus.path}: give a text of its own vocabulary by --data")
    if source and from_folder:
        if not known:
            raise UserError(f"{source.path} has no {TOKENIZER_FILE}, by which the text could be compared: save its fast tokenizer there")
        callbacks.append(Export(source))
    if source and flags.teacher is not None:
        callbacks.append(SelfTeacher(task) if flags.teacher == SELF else Teacher(task))
    if source and flags.moe_prune_to is not None:
        callbacks.append(Pruning(flags.moe_prune_to, flags.max_step, flags.moe_prune_by))
    return Run(task, source, callbacks)


def finetuning_run(flags: FinetuneFlags, examples: Examples, engine: Engine, source: Source) -> Run:
    """Fine-tuning of a checkpoint, or with --from_scratch of a model like it."""
    return Run(finetuning_task(flags, examples, engine, source), source)
