"""Sets up runs: pre-training from random weights or from a checkpoint, and fine-tuning."""

from utils.checkpoints.origin import Source
from utils.data.corpus import Corpus
from utils.data.rows import Examples
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import FinetuneFlags, Flags
from utils.tasks.choose import finetuning_task, pretraining_task
from utils.training.pruning import Pruning
from utils.training.run import Run
from utils.training.teacher import Teacher


def pretraining_run(flags: Flags, corpus: Corpus, engine: Engine, source: Source | None = None) -> Run:
    """Pre-training from random weights or a checkpoint. UserError for a text of other word pieces than the checkpoint's."""
    task, callbacks = pretraining_task(flags, corpus, engine), []
    if source is None:
        return Run(task)
    if (known := source.flags.get("vocabulary_sha256")) and known != task.vocabulary.sha256:
        raise UserError(
            f"{source.path} was trained on other word pieces than those of {corpus.path}: give a text prepared with its tokenizer by --data"
        )
    if flags.teacher is not None:
        callbacks.append(Teacher(task))
    if flags.moe_prune_to is not None:
        callbacks.append(Pruning(flags.moe_prune_to, flags.max_step))
    return Run(task, source, callbacks)


def finetuning_run(flags: FinetuneFlags, examples: Examples, engine: Engine, source: Source) -> Run:
    """Fine-tuning of a checkpoint, or with --from_scratch of a model like it."""
    return Run(finetuning_task(flags, examples, engine, source), source)
