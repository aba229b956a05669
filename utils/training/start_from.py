"""Pre-training that goes on from weights, such as those that surgery left."""

from typing import Any

from torch import nn

from utils.checkpoints import weights as transfer
from utils.checkpoints.origin import Source
from utils.data.corpus import Corpus
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import Flags
from utils.models.registry import architecture
from utils.tasks.base import Task
from utils.training.identity import start_departures
from utils.training.pruning import Pruned
from utils.training.teacher import Taught


class FromWeights(Task):
    """Put before the class of a model's own task. UserError for a text of other word pieces than the weights are of."""

    table = "surgery"

    def __init__(self, flags: Flags, corpus: Corpus, engine: Engine, source: Source):
        super().__init__(flags, corpus, engine)
        self.source = source
        if (known := source.flags.get("vocabulary_sha256")) and known != self.vocabulary.sha256:
            raise UserError(
                f"{source.path} was trained on other word pieces than those of {corpus.path}: give a text of its own with --data"
            )

    @property
    def fingerprints(self) -> dict[str, str]:
        return super().fingerprints | {"checkpoint_sha256": self.source.fingerprint}

    @property
    def departures(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return start_departures(self.flags, self.source)

    def build(self) -> nn.Module:
        """UserError for a checkpoint that does not fit."""
        model = super().build()
        transfer.load(model, self.source)
        return model

    def describe(self) -> list[str]:
        return [*super().describe(), f"weights from {self.source.path} ({self.source.title})"]

    def provenance(self) -> dict[str, Any]:
        return {"pretrained": self.source.provenance(transferred=True)}


def pretraining(flags: Flags, corpus: Corpus, engine: Engine, source: Source | None) -> Task:
    """What a model is pre-trained on, from random weights or from those of a checkpoint."""
    kind = architecture(flags.model).Task
    if source is None:
        return kind(flags, corpus, engine)

    more = [Taught] * (flags.teacher is not None) + [Pruned] * (flags.moe_prune_to is not None)

    class Continued(*more, FromWeights, kind):
        pass

    return Continued(flags, corpus, engine, source)
