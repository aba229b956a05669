"""Learning from a teacher: a model in training is to predict what a larger, trained one predicts (arXiv 2310.01334, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smoe_dropout import set_top_k
from smoe_dropout.surgery.compression import distilled
from utils.checkpoints import weights as transfer
from utils.checkpoints.origin import open_source
from utils.models.build import build_model
from utils.tasks.base import State, Task

if TYPE_CHECKING:
    from smoe_dropout.methods.base import Objective
    from utils.engine import Engine


class Teacher:
    """Reads what a model in training reads, with a memory of its own, and keeps what both predict.

    Its memory goes behind the model's in the state that is carried from batch to batch, and is split, saved and resumed with it.
    """

    def __init__(self, model: nn.Module, engine: Engine):
        self.model, self.engine = model.eval().requires_grad_(False), engine
        self.logits: list[tuple[Tensor, Tensor]] = []  # of the model and the teacher, of the passes since it was emptied
        self._inputs: tuple[Any, ...] = ()

    def follow(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not model.training:
            return None
        *inputs, state = arguments
        half = len(state) // 2 if state else 0
        self._inputs = (*inputs, state[half:] if state else None)
        return (*inputs, state[:half] if state else None)

    def _after(self, model: nn.Module, _arguments: tuple[Any, ...], output: tuple[Tensor, State, Tensor]) -> tuple | None:
        if not model.training:
            return None
        losses, state, logits = output
        with torch.no_grad(), self.engine.autocast():
            _, own_state, teacher_logits = self.model(*self._inputs)
        self.logits.append((logits, teacher_logits.float()))
        return losses, (*state, *own_state) if state else None, logits


class Taught(Task):
    """Put before a task that starts from weights. What is recorded of operations is the model's, without the teacher's."""

    def __init__(self, flags, corpus, engine, source):
        super().__init__(flags, corpus, engine, source)
        self._of = open_source(Path(flags.teacher))
        model = build_model(self._of.made, self.vocabulary)
        transfer.load(model, self._of)
        if self._of.made.moe:
            set_top_k(model, self._of.made.moe_num_expert)
        self._teacher = Teacher(model.to(engine.device), engine)

    @property
    def fingerprints(self) -> dict[str, str]:
        return super().fingerprints | {"teacher_sha256": self._of.fingerprint}

    def build(self) -> nn.Module:
        model = super().build()
        self._teacher.follow(model)
        return model

    def objective(self, of_the_method: Callable[[nn.Module, Callable], Objective]) -> Callable[[nn.Module, Callable], Objective]:
        """The method's, and the divergence from the teacher, the mean of the method's passes."""
        temperature = self.flags.teacher_temperature

        def taught(model: nn.Module, forward: Callable) -> Objective:
            self._teacher.logits = []
            part = of_the_method(model, forward)
            total, passes = part.total, self._teacher.logits
            for ours, theirs in passes:
                total = distilled(total, ours, theirs, self.flags.teacher_weight / len(passes), temperature)
            return part._replace(total=total)

        return taught

    def full_state(self, rows: int) -> State:
        state = super().full_state(rows)
        return state and 2 * state

    def describe(self) -> list[str]:
        return [*super().describe(), f"teacher: {self._of.path} ({self._of.title})"]

    def provenance(self) -> dict[str, Any]:
        found = super().provenance()
        return {"pretrained": found["pretrained"] | {"teacher": self._of.provenance(transferred=False)}}
