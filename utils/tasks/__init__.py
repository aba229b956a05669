"""What a model is trained and measured on: its batches, and the name of its quality. A task is one file with a subclass of `Task`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from utils.models import Shape, architecture

if TYPE_CHECKING:
    from utils.data import Corpus
    from utils.engine import Engine
    from utils.flags import Flags

State = tuple[Tensor, ...] | None  # what a model carries from one batch to the next: tensors with rows along dimension 0


class Metric(NamedTuple):
    """The quality that tables show, from the mean loss in nats."""

    name: str
    lower_is_better: bool
    of: Callable[[float], float]


class Batch(NamedTuple):
    """inputs: the model's arguments before the state, this process's rows along dimension 0. shape: of the rows of all processes together.
    first: nothing is carried into it.
    """

    inputs: tuple[Tensor, ...]
    shape: Shape
    first: bool = True

    @property
    def targets(self) -> int:
        """Positions with a loss in this process's rows."""
        return len(self.inputs[0]) * self.shape.targets


class Task(ABC):
    """A corpus, read as the flags say by one process of a run. `vocabulary`: of a corpus of word pieces, else None."""

    metric: Metric

    def __init__(self, flags: Flags, corpus: Corpus, engine: Engine):
        self.flags, self.corpus, self.engine = flags, corpus, engine
        self.architecture: ModuleType = architecture(flags.model)

    @property
    def vocabulary(self):
        return self.corpus.vocabulary

    @abstractmethod
    def next(self) -> Batch:
        """The next training batch."""

    @abstractmethod
    def peek(self) -> Batch:
        """A training batch, without going on."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where in the training data the run is."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. UserError for another corpus."""

    @abstractmethod
    def held_out(self, split: str, everything: bool = False) -> Iterator[Batch]:
        """A split in order, once: this process's rows, or `everything`."""

    def full_state(self, rows: int) -> State:
        """A state as large as it gets in training."""
        return None

    def evaluation(self, model: nn.Module) -> AbstractContextManager:
        """Within it the model is as evaluation wants it."""
        return nullcontext()

    @property
    @abstractmethod
    def evaluation_shape(self) -> Shape:
        """Of a usual batch of evaluation."""

    def forward_flops(self, model: nn.Module, shape: Shape, k: int | None) -> int:
        """Operations of one forward pass."""
        return self.architecture.forward_flops(model, shape, k)
