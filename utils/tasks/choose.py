"""Which task fine-tuning means, by the names of --task."""

from utils.flags.fields import FinetuneFlags
from utils.models.registry import architecture
from utils.tasks.choice import Answers
from utils.tasks.labelled import Labelled
from utils.tasks.word_problems import Continued, Decoded


def task_class(flags: FinetuneFlags) -> type[Labelled]:
    if flags.task in ("sst2", "csqa"):
        return Answers
    return Continued if architecture(flags.model).CAUSAL else Decoded
