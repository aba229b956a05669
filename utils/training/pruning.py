"""Compressed experts W = U V + S whose S is pruned while they are trained; afterwards they are stored without what was pruned."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smoe_dropout.surgery.compression import Pruner
from utils.checkpoints.origin import SURGERY
from utils.checkpoints.weights import store
from utils.tasks.base import Task
from utils.training.run_folder import write_json
from utils.training.surgery_measure import since_the_first, time_ratios

LEFT = "compressed"


class Pruned(Task):
    """Put before a task that starts from the weights of compressed experts. Its last weights are those that are tested, since only they are
    pruned as far as asked for; they are left in `compressed` in the run's folder, which is read like a folder of surgery.py.
    """

    selects = False

    def begin(self, model: nn.Module) -> None:
        self._pruner = Pruner(model, self.flags.moe_prune_to, self.flags.max_step)

    def after_update(self) -> None:
        self._pruner.step()

    def tensors(self) -> dict[str, Tensor]:
        return self._pruner.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._pruner.load_state_dict(tensors)

    def finished(self, model: nn.Module) -> nn.Module:
        self._pruner.finish()
        whole = self.build().to(self.engine.device)  # as it began, with nothing pruned
        surgery = self.source.surgery or {"label": "compress"}
        time = since_the_first(surgery, time_ratios((self, whole), (self, model)))
        self._surgery = surgery | {"pruned_to": self.flags.moe_prune_to, "time": time}
        if self.engine.is_main:
            self._leave(model)
        return model

    def provenance(self) -> dict[str, Any]:
        """With the time of a pass as it is when S is pruned."""
        found = super().provenance()
        return {"pretrained": found["pretrained"] | ({"surgery": self._surgery} if self.source.surgery else {})}

    def _leave(self, model: nn.Module) -> None:
        flags, share = self.flags, self.flags.moe_prune_to
        folder = Path(flags.work_dir) / LEFT
        store(model, folder / "checkpoints")
        made = dataclasses.replace(flags, moe_sparse_share=share, moe_prune_to=None, start_from=None, teacher=None)
        write_json(folder / "config.json", dataclasses.asdict(made) | self.fingerprints)
        words = f"pruned to {share:g} in {flags.max_step:,} steps{', taught' if flags.teacher else ''}"
        label, title = (f"{before}, {words}" for before in (self._surgery["label"], self.source.title))
        write_json(folder / SURGERY, self._surgery | {"label": label, "title": title})
