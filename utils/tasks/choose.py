"""Makes the task of a run: pre-training by what the model reads, fine-tuning by --task."""

from smoe_dropout.registry import load
from utils.checkpoints.origin import Source
from utils.data.corpus import Corpus
from utils.data.rows import Examples, kind_of
from utils.engine import Engine
from utils.flags.fields import FinetuneFlags, Flags
from utils.flags.models import MODELS
from utils.tasks.base import Task
from utils.tasks.encoding import encoder_of
from utils.tasks.labelled import LabelledTask

PRETRAINING = {
    "bytes": "utils.tasks.language_modelling:LanguageModelling",
    "pieces": "utils.tasks.masked:MaskedLanguageModelling",
}


def pretraining_task(flags: Flags, corpus: Corpus, engine: Engine) -> Task:
    """UserError for a corpus the model cannot read, or one that is too short."""
    return load(PRETRAINING, "unit", MODELS[flags.model].reads)(flags, corpus, engine)


def finetuning_task(flags: FinetuneFlags, examples: Examples, engine: Engine, source: Source) -> LabelledTask:
    """UserError for a tokenizer that is not the checkpoint's, and for rows that do not fit the flags."""
    task = kind_of(flags.task).task
    return load({flags.task: task}, "task", flags.task)(flags, examples, engine, encoder_of(flags, source))
