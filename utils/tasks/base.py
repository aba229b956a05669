"""A task: batches, a loss, and a metric. It knows neither how the model is built nor where its weights come from.

The loss is computed by the model, called as model(*batch.inputs, state); the metric is the mean of what `measure` sums over a split.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from utils.data.attack import attack_of
from utils.errors import UserError
from utils.models.registry import Shape

if TYPE_CHECKING:
    from utils.data.corpus import Corpus
    from utils.data.meta import Tokens, Vocabulary
    from utils.data.rows import Examples
    from utils.engine import Engine
    from utils.flags.fields import Flags

State = tuple[Tensor, ...] | None  # carried from one batch to the next: tensors with rows along dimension 0


class Metric(NamedTuple):
    """The quality shown in tables, computed by `of` from the mean of what `Task.measure` sums. of_loss: that mean is the loss in nats.
    also: further measures by name, from the split and that mean.
    """

    name: str
    lower_is_better: bool
    of: Callable[[float], float]
    of_loss: bool = True
    also: Callable[[str, float], dict[str, float]] = lambda split, mean: {}

    @property
    def in_training(self) -> str:
        """The quantity shown for training: the metric, or the loss if the metric cannot be computed from it."""
        return self.name if self.of_loss else "loss"


def perplexity_of(corpus: Corpus) -> Metric:
    """Perplexity per token of a text of tokens, and bits per byte of the text, by which models of other tokens can be compared."""

    def per_byte(split: str, nats: float) -> dict[str, float]:
        return {"bits_per_byte": nats / math.log(2) * len(getattr(corpus, split)) / corpus.meta["text_bytes"][split]}

    return Metric("perplexity", True, math.exp, also=per_byte)


class Batch(NamedTuple):
    """inputs: the model's arguments before the state, this process's rows along dimension 0. shape: of all processes' rows together.
    first: no state is carried into this batch. rows: the rows behind the inputs, for tasks whose metric needs them.
    """

    inputs: tuple[Tensor, ...]
    shape: Shape
    first: bool = True
    rows: list | None = None

    @property
    def targets(self) -> int:
        """Positions with a loss in this process's rows."""
        return len(self.inputs[0]) * self.shape.targets


class Task(ABC):
    """Training and evaluation data of one process of a run.

    splits: those of the final test; the first is also used for validation, the last is shown in tables. selects_best: the best weights on
    validation are tested, not the last ones. vocabulary: of word pieces or tokens, or None for bytes. attack: of the final test, if any.
    """

    metric: Metric
    splits: tuple[str, ...] = ("valid", "test")
    selects_best = True

    def __init__(self, flags: Flags, corpus: Corpus | Examples, engine: Engine, vocabulary: Vocabulary | Tokens | None = None):
        self.flags, self.corpus, self.engine, self.vocabulary = flags, corpus, engine, vocabulary or corpus.vocabulary
        self.attack = attack_of(flags.attack, flags.attack_rate, self.vocabulary, corpus.path)
        self._step = 0

    @abstractmethod
    def training_batch(self, step: int) -> Batch:
        """The batch of a step, a function of the step. Steps are requested in ascending order, from any step on."""

    def next(self) -> Batch:
        """The next training batch."""
        self._step += 1
        return self.training_batch(self._step - 1)

    def peek(self) -> Batch:
        """A typical training batch, without advancing."""
        return self.training_batch(self._step)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data."""
        return {"step": self._step, "fingerprint": self.corpus.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position. UserError if it belongs to other data."""
        if state.get("fingerprint") != self.corpus.fingerprint:
            raise UserError(f"the saved state belongs to other data than {self.corpus.path}: resume with the same data")
        self._step = state["step"]

    @abstractmethod
    def held_out(self, split: str, everything: bool = False, attacked: bool = False) -> Iterator[Batch]:
        """One pass over a split in order: this process's rows, or all rows with `everything`; with `attacked` the input is corrupted."""

    @property
    @abstractmethod
    def evaluation_shape(self) -> Shape:
        """Shape of a typical evaluation batch."""

    def measure(self, model: nn.Module, batch: Batch, state: State) -> tuple[float, int, State]:
        """A sum over the batch, the count to divide it by, and the next state; by default the sum of losses and their number."""
        losses, state, _ = model(*batch.inputs, state)
        return losses.double().sum().item(), losses.numel(), state

    def evaluation(self, model: nn.Module) -> AbstractContextManager:
        """Context manager that configures the model for evaluation."""
        return nullcontext()

    def with_head(self, model: nn.Module) -> nn.Module:
        """The pre-trained model turned into one for this task."""
        return model
