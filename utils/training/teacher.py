"""Distillation: training also matches the predictions of a larger, trained model (arXiv 2310.01334, section 3.3)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout import get_top_k, set_top_k, top_k
from smoe_dropout.methods.base import Forward, Objective
from smoe_dropout.surgery.compression import distilled
from utils.checkpoints import weights
from utils.checkpoints.origin import open_source
from utils.flags.fields import SELF
from utils.models.build import build_model
from utils.tasks.base import State, Task
from utils.training.identity import provenance
from utils.training.run import Callback, ObjectiveOf, Pass


class SelfTeacher(Callback):
    """The model itself with all experts active, without gradient and dropout, as the teacher of fewer experts (arXiv 1903.05134).

    At k = E there is nothing to learn from itself. Only for a model that carries no state. Recorded FLOPs do not include the teacher.
    """

    def __init__(self, task: Task):
        self.flags, self.engine = task.flags, task.engine
        self._logits: list[tuple[Tensor, Tensor]] = []  # of the model and the teacher, for the passes of one objective
        self._model: nn.Module | None = None

    def fingerprints(self) -> dict[str, str]:
        """A word in place of the hash of a teacher's weights, which follow from those of the model."""
        return {"teacher_sha256": hashlib.sha256(SELF.encode()).hexdigest()}

    def describe(self) -> list[str]:
        return ["teacher: the model itself at k = E"]

    def objective(self, objective: ObjectiveOf) -> ObjectiveOf:
        """Adds the divergence from the teacher, averaged over the passes of the method."""

        def taught(model: nn.Module, forward: Callable[[], Forward]) -> Objective:
            self._logits, self._model = [], model
            part = objective(model, forward)
            total, passes = part.total, self._logits
            squared = self.flags.teacher_squared or self.flags.teacher == SELF
            for ours, theirs in passes:
                weight, temperature = self.flags.teacher_weight / len(passes), self.flags.teacher_temperature
                total = distilled(total, ours, theirs, weight, temperature, squared)
            return part._replace(total=total)

        return taught

    def forward(self, run_model: Pass, inputs: tuple[Tensor, ...], state: State) -> Forward:
        """Runs the teacher and then the model, whose auxiliary losses are those of the last pass."""
        model, most = self._model, self.flags.moe_num_expert
        if get_top_k(model) == most:
            return run_model(inputs, state)
        model.eval()
        with torch.no_grad(), self.engine.autocast(), top_k(model, most):
            _, _, theirs = model(*inputs, None)
        model.train()
        passed = run_model(inputs, state)
        self._logits.append((passed.logits, theirs.float()))
        return passed

    def provenance(self) -> dict[str, Any]:
        return {"teacher": SELF}


class Teacher(SelfTeacher):
    """A trained model. Runs on the model's inputs with its own memory, and adds the divergence between their predictions to the loss.

    The teacher's memory follows the model's in the state that is carried from batch to batch, and is split, saved and resumed with it.
    Recorded FLOPs do not include the teacher.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        self.source = open_source(Path(task.flags.teacher))
        made = dataclasses.replace(self.source.made, tgt_len=self.flags.tgt_len, teacher=self.flags.teacher)  # so that it gives logits
        model = build_model(made, task.vocabulary)
        weights.load(model, self.source)
        if self.source.made.moe:
            set_top_k(model, self.source.made.moe_num_expert)
        self.model = model.to(self.engine.device).eval().requires_grad_(False)

    def fingerprints(self) -> dict[str, str]:
        return {"teacher_sha256": self.source.fingerprint}

    def describe(self) -> list[str]:
        return [f"teacher: {self.source.path} ({self.source.summary})"]

    def forward(self, run_model: Pass, inputs: tuple[Tensor, ...], state: State) -> Forward:
        """Runs the model and then the teacher. The first half of the state is the model's, the second the teacher's."""
        half = len(state) // 2 if state else 0
        ours, theirs = (state[:half], state[half:]) if state else (None, None)
        passed = run_model(inputs, ours)
        with torch.no_grad(), self.engine.autocast():
            _, theirs, logits = self.model(*inputs, theirs)
        self._logits.append((passed.logits, logits.float()))
        return passed._replace(state=(*passed.state, *theirs) if passed.state else None)

    def provenance(self) -> dict[str, Any]:
        return {"teacher": provenance(self.source, transferred=False)}
