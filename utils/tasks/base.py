"""What a model is trained and measured on: its batches, and the name of its quality. A task is one file with a subclass of `Task`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from utils.errors import UserError
from utils.flags.derive import usual_flags
from utils.models.build import build_model
from utils.models.registry import Shape, architecture
from utils.training.identity import departures

if TYPE_CHECKING:
    from smoe_dropout.methods.base import Objective
    from utils.data.corpus import Corpus
    from utils.engine import Engine
    from utils.flags.fields import Flags

State = tuple[Tensor, ...] | None  # what a model carries from one batch to the next: tensors with rows along dimension 0


class Metric(NamedTuple):
    """The quality that tables show, from the mean of what `Task.measure` sums up. `of_loss`: that is the loss in nats."""

    name: str
    lower_is_better: bool
    of: Callable[[float], float]
    of_loss: bool = True

    @property
    def in_training(self) -> str:
        """What is shown of training: the quality, or the loss where that says nothing of it."""
        return self.name if self.of_loss else "loss"


class Batch(NamedTuple):
    """inputs: the model's arguments before the state, this process's rows along dimension 0. shape: of the rows of all processes together.
    first: nothing is carried into it. rows: what the inputs were made from, where a task scores by it.
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
    """A corpus, read as the flags say by one process of a run. `vocabulary`: of a corpus of word pieces, else None.

    splits: those of the final test, the first also of validation, the last that of the table. selects: the best weights on validation are
    tested, and not the last ones.
    """

    metric: Metric
    table = "table1"
    splits: tuple[str, ...] = ("valid", "test")
    selects = True
    note = ""  # what of the data has to stand beside a quality on it

    def __init__(self, flags: Flags, corpus: Corpus, engine: Engine):
        self.flags, self.corpus, self.engine = flags, corpus, engine
        self.architecture: ModuleType = architecture(flags.model)

    @property
    def vocabulary(self):
        return self.corpus.vocabulary

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of what a run is made from: it cannot go on with anything else."""
        pieces = {"vocabulary_sha256": self.vocabulary.sha256} if self.vocabulary else {}
        return {"data_fingerprint": self.corpus.fingerprint} | pieces

    @property
    def sizes(self) -> dict[str, int]:
        """Of the splits."""
        return {split: len(getattr(self.corpus, split)) for split in ("train", *self.splits)}

    @property
    def departures(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where the run departs from what its preset says, and where from what its method says: tables say it."""
        return departures(self.flags, usual_flags(self.flags))

    def objective(self, of_the_method: Callable[[nn.Module, Callable], Objective]) -> Callable[[nn.Module, Callable], Objective]:
        """What is minimised, from what the method would minimise."""
        return of_the_method

    def begin(self, model: nn.Module) -> None:  # noqa: B027 (most have nothing to do)
        """Told the model when it is on its device, before the first step."""

    def after_update(self) -> None:  # noqa: B027 (most have nothing to do)
        """Told of every step of the optimiser, when the gradients are still there."""

    def finished(self, model: nn.Module) -> nn.Module:
        """The model that a run has made, from its weights at the end."""
        return model

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved of the task besides `state_dict`."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 (most have nothing to do)
        """Goes on from there."""

    def build(self) -> nn.Module:
        """The model, as it is before a run."""
        return build_model(self.flags, self.vocabulary)

    def describe(self) -> list[str]:
        """What else is to be said when a run begins."""
        return []

    def provenance(self) -> dict[str, Any]:
        """What a record says of where the weights came from."""
        return {}

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

    def measure(self, model: nn.Module, batch: Batch, state: State) -> tuple[float, int, State]:
        """A sum over the batch, what it is to be divided by, and the state to carry on; here of losses, over positions with a loss."""
        losses, state, _ = model(*batch.inputs, state)
        return losses.double().sum().item(), losses.numel(), state

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


class Numbered(Task):
    """A task whose training batches are a function of the step."""

    def __init__(self, flags: Flags, corpus: Corpus, engine: Engine):
        super().__init__(flags, corpus, engine)
        self._step = 0

    @abstractmethod
    def training_batch(self, step: int) -> Batch:
        """The one of a step; steps are asked for in order, from any on."""

    def next(self) -> Batch:
        self._step += 1
        return self.training_batch(self._step - 1)

    def peek(self) -> Batch:
        return self.training_batch(self._step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "fingerprint": self.corpus.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("fingerprint") != self.corpus.fingerprint:
            raise UserError(f"the saved state is of another text than {self.corpus.path}: resume with the same data")
        self._step = state["step"]
