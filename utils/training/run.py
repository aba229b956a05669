"""A training run: a task, the weights it starts from, and the callbacks of its loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from smoe_dropout import moe_layers
from smoe_dropout.methods.base import Forward, Objective, cross_entropy
from utils.checkpoints import weights
from utils.checkpoints.origin import Source
from utils.data.rows import kind_of
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.derive import method_of
from utils.flags.fields import FinetuneFlags, Flags
from utils.flags.models import MODELS
from utils.models.build import build_model, training_settings
from utils.tasks.base import State, Task
from utils.training.identity import provenance

Pass = Callable[[tuple[Tensor, ...], State], Forward]  # runs the model on inputs and a state
ObjectiveOf = Callable[[nn.Module, Callable[[], Forward]], Objective]  # the loss of a model, given a function that runs it once


class Callback:
    """An addition to the training loop, such as a teacher or a pruner.

    The methods do nothing by default, and are called by train.py in this order. selects_best: whether the weights that are best on
    validation may be tested; otherwise the last ones are.
    """

    selects_best = True

    def fingerprints(self) -> dict[str, str]:
        """Hashes that a resumed run has to share with the stored one."""
        return {}

    def describe(self) -> list[str]:
        """Lines printed when the run starts."""
        return []

    def begin(self, model: nn.Module) -> None:
        """Called once before the first step, with the model on its device."""

    def objective(self, objective: ObjectiveOf) -> ObjectiveOf:
        """Wraps the objective that is minimised."""
        return objective

    def forward(self, run_model: Pass, inputs: tuple[Tensor, ...], state: State) -> Forward:
        """Wraps each forward pass in training."""
        return run_model(inputs, state)

    def after_update(self) -> None:
        """Called after each optimiser step, before gradients are cleared."""

    def tensors(self) -> dict[str, Tensor]:
        """State to be saved in checkpoints."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the state saved by `tensors`."""

    def finished(self, run: Run, model: nn.Module) -> nn.Module:
        """Called with the weights to be tested; returns the model to test."""
        return model

    def provenance(self) -> dict[str, Any]:
        """Further entries of the record under "pretrained"."""
        return {}


@dataclass
class Run:
    """source: the checkpoint that the weights, or with --from_scratch the sizes, come from; None for random weights."""

    task: Task
    source: Source | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self):
        self.flags: Flags = self.task.flags
        self.engine: Engine = self.task.engine
        self.is_finetuning = isinstance(self.flags, FinetuneFlags)
        self.transfers = self.source is not None and not getattr(self.flags, "from_scratch", False)
        self.selects_best = self.task.selects_best and all(callback.selects_best for callback in self.callbacks)

    def build(self) -> nn.Module:
        """The model before training. UserError for a checkpoint that does not fit, or a method that would route by padding."""
        flags, task = self.flags, self.task
        backbone = build_model(flags, task.vocabulary)
        if self.is_finetuning and not MODELS[flags.model].causal and any(layer.needs for _, layer in moe_layers(backbone)):
            raise UserError(f"--method {flags.method} routes a token of {flags.model} by its neighbours, and padding would be one")
        if self.transfers:
            weights.load(backbone, self.source)
        stored = dict(backbone.named_parameters())
        model = task.with_head(backbone)
        self.handed_over = weights.handed_over(stored, model)
        return model

    def fingerprints(self) -> dict[str, str]:
        """Hashes of all inputs of the run, which can be resumed only with the same ones."""
        vocabulary, source = self.task.vocabulary, self.source
        found = {"data_fingerprint": self.task.corpus.fingerprint}
        found |= {"vocabulary_sha256": vocabulary.sha256} if vocabulary else {}
        found |= {"checkpoint_sha256": source.fingerprint} if source else {}
        found |= {"tokens_sha256": self.task.tokens_sha256} if self.is_finetuning and vocabulary else {}
        return found | {name: value for callback in self.callbacks for name, value in callback.fingerprints().items()}

    def objective(self) -> ObjectiveOf:
        """The method's loss, as wrapped by the callbacks."""
        method, settings = method_of(self.flags), training_settings(self.flags, len(self.task.corpus.train))
        objective = partial(method.objective if method else cross_entropy, settings=settings)
        for callback in self.callbacks:
            objective = callback.objective(objective)
        return objective

    def forward(self, run_model: Pass, inputs: tuple[Tensor, ...], state: State) -> Forward:
        """One forward pass in training, as wrapped by the callbacks."""
        for callback in self.callbacks:
            run_model = partial(callback.forward, run_model)
        return run_model(inputs, state)

    def tensors(self) -> dict[str, Tensor]:
        """State of the callbacks, to be saved in checkpoints."""
        return {name: tensor for callback in self.callbacks for name, tensor in callback.tensors().items()}

    def provenance(self) -> dict[str, Any]:
        """The record's entries about the initial weights, and the fold; empty for random weights."""
        if self.source is None:
            return {}
        start = provenance(self.source, self.transfers)
        for callback in self.callbacks:
            start |= callback.provenance()
        if not self.is_finetuning:
            return {"pretrained": start}
        fold = {"fold": self.flags.fold} if kind_of(self.flags.task).folds > 1 else {}
        return {"pretrained": start | self.handed_over._asdict()} | fold
