"""Pruning in training: the S of compressed experts W = U V + S loses hidden units gradually, and is stored without them at the end."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smoe_dropout.surgery.compression import Pruner
from utils import documents
from utils.checkpoints.run_files import CONFIG, SURGERY, config_of, config_sha256
from utils.checkpoints.weights import store
from utils.flags.fields import Flags, names
from utils.training.evaluation import chained, time_ratios
from utils.training.identity import operations_of, own_settings, training_of
from utils.training.run import Callback, Run

FOLDER = "compressed"


class Pruning(Callback):
    """Prunes to --moe_prune_to by the last step. The last weights are the ones tested, since only they are fully pruned; they are also
    stored in `compressed` in the run's folder, which is read like a folder of surgery.py.
    """

    selects_best = False

    def __init__(self, kept: float, steps: int, by: str):
        self.kept, self.steps, self.by = kept, steps, by

    def begin(self, model: nn.Module) -> None:
        self._pruner = Pruner(model, self.kept, self.steps, self.by)

    def after_update(self) -> None:
        self._pruner.step()

    def tensors(self) -> dict[str, Tensor]:
        return self._pruner.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._pruner.load_state_dict(tensors)

    def finished(self, run: Run, model: nn.Module) -> nn.Module:
        self._pruner.finish()
        unpruned = run.build().to(run.engine.device)
        self._earlier = run.source.surgery
        surgery = self._earlier or {"source_sha256": run.source.fingerprint}
        time = chained(surgery, time_ratios((run.task, unpruned), (run.task, model)))
        self._surgery = surgery | {"pruned_to": self.kept, "time": time}
        if run.engine.is_main:
            self._store(run, model)
        return model

    def provenance(self) -> dict[str, Any]:
        """The surgery, with the time of a pass after pruning."""
        return {"surgery": self._surgery} if self._earlier else {}

    def _store(self, run: Run, model: nn.Module) -> None:
        flags, folder = run.flags, Path(run.flags.work_dir) / FOLDER
        stored = {"moe_sparse_share": self.kept} if self.by == "units" else {}  # else pruned rows are stored, as zeros
        made = dataclasses.replace(flags, **stored, **{name: getattr(Flags, name) for name in names(role="start")})
        config = config_of(made, run.fingerprints())
        identity = config_sha256(config)
        store(model, folder / "checkpoints", identity)
        documents.write(folder / CONFIG, config)
        taught = {"taught": True} if flags.teacher else {}
        settings = {"settings": own} if (own := own_settings(flags)) else {}
        by = {"pruned_by": self.by} if self.by == "rows" else {}  # as earlier records have it, units
        training = {"method": "train", "steps": flags.max_step, "pruned_to": self.kept, **by, **taught, **settings}
        operations = [*operations_of(run.source), training]
        operated = {"trained": training_of(run.source), "operations": operations} | self._surgery
        documents.write(folder / SURGERY, operated | {"config_sha256": identity})
