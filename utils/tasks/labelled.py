"""Fine-tuning: rows with an answer, batched with others of like length. A task says how a row is read and how it is scored.

Rows stand alone: no memory goes from one to the next, and what stands behind a row's end is padding, which no prediction looks at (a load
balance counts it). Batches are a function of the seed alone; each process takes its rows of every one.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smoe_dropout import moe_layers
from utils.checkpoints import weights as transfer
from utils.checkpoints.origin import Source
from utils.data.lanes import rank_lanes
from utils.data.rows import KINDS, Examples
from utils.errors import UserError
from utils.flags.fields import FinetuneFlags
from utils.models.build import build_model
from utils.models.registry import Shape
from utils.tasks.base import Batch, Numbered
from utils.tasks.encoding import Text
from utils.training.identity import finetuning_departures

ORDER = 1  # what a random stream is for
POOL = 50  # batches whose rows are sorted by length together


class Labelled(Numbered):
    """Raises UserError for a row longer than --max_length, and for fewer rows than a batch has.

    sequences: texts of a row, each read on its own.
    """

    selects = False
    sequences = 1

    def __init__(self, flags: FinetuneFlags, examples: Examples, engine, source: Source, text: Text):
        super().__init__(flags, examples, engine)
        self.source, self.text, self.splits = source, text, (examples.split,)
        self.table = "surgery" if source.surgery else "table2"
        self._rows = {"train": self.read(examples.train), examples.split: self.read(examples.held_out)}
        self._lengths = {split: np.array([self.length(row) for row in rows]) for split, rows in self._rows.items()}
        self._own = rank_lanes(flags.batch_size, engine.rank, engine.world_size)
        self._epoch, self._order = -1, np.empty((0, 0), np.int64)
        for split, lengths in self._lengths.items():
            if (longest := int(lengths.max())) > flags.max_length:
                row = f"row {int(lengths.argmax()) + 1} of {split} of {examples.path} has {longest} positions"
                raise UserError(f"{row}, and --max_length is {flags.max_length}: raise it, or shorten the row")
        if (there := len(self._rows["train"])) < flags.batch_size:
            raise UserError(f"train of {examples.path} has {there} rows, and --batch_size is {flags.batch_size}: use a smaller one")

    @abstractmethod
    def read(self, examples: list) -> list:
        """The rows of a split as numbers."""

    @abstractmethod
    def length(self, row: Any) -> int:
        """Positions of a row's longest sequence."""

    @abstractmethod
    def collate(self, rows: list, length: int) -> tuple[Tensor, ...]:
        """Some rows as the model's arguments, padded to T = `length`; the first are the tokens [B, ..., T]."""

    @abstractmethod
    def ready(self, backbone: nn.Module) -> nn.Module:
        """The pre-trained model made into one for this task, which keeps it as `backbone`."""

    @property
    def vocabulary(self):
        return self.text.vocabulary

    @property
    def _folds(self) -> int:
        return KINDS[self.flags.task].folds

    @property
    def note(self) -> str:
        return self.corpus.notes

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(rows) for split, rows in self._rows.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        return super().fingerprints | {"checkpoint_sha256": self.source.fingerprint}

    @property
    def departures(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return finetuning_departures(self.flags, self.source)

    def build(self) -> nn.Module:
        """UserError for a checkpoint that does not fit, or a method that cannot do without knowing what is padding."""
        backbone = build_model(self.flags, self.vocabulary)
        if not self.architecture.CAUSAL and any(layer.needs for _, layer in moe_layers(backbone)):
            raise UserError(
                f"--method {self.flags.method} routes a token of {self.flags.model} by its neighbours, and padding would be one"
            )
        if not self.flags.from_scratch:
            transfer.load(backbone, self.source)
        stored = dict(backbone.named_parameters())
        model = self.ready(backbone)
        self._handed_over = transfer.handed_over(stored, model)
        return model

    def describe(self) -> list[str]:
        kept, new, unused = self._handed_over
        origin = "random, in a model like that of" if self.flags.from_scratch else "from"
        made = f"; new: {', '.join(new)}" if new else ""
        left = f"; not used: {', '.join(unused)}" if unused else ""
        rows = ", ".join(f"{count:,} {split}" for split, count in self.sizes.items())
        fold = f", fold {self.flags.fold} of {self._folds} held out" if self._folds > 1 else ""
        return [f"rows: {rows}{fold}", f"weights {origin} {self.source.path} ({self.source.title}): {kept:,} parameters{made}{left}"]

    def sequences_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens [N, T] and how many of each row are no padding [N]."""
        return batch.inputs[0], torch.tensor([self.length(row) for row in batch.rows], device=self.engine.device)

    def _batch(self, rows: list, size: int, longest: int = 0) -> Batch:
        """This process's rows of a batch of `size`, the longest of which may be another's."""
        inputs = self.collate(rows, max(longest, *map(self.length, rows)))
        shape = Shape(size, inputs[0].numel() // len(rows), targets=1)
        return Batch(tuple(tensor.to(self.engine.device) for tensor in inputs), shape, rows=rows)

    def _share(self, split: str, indices: np.ndarray, own: range) -> Batch:
        """`own` of a batch's rows, padded as all of them would be, so that what is counted does not depend on the number of processes."""
        rows = [self._rows[split][index] for index in indices[own.start : own.stop]]
        return self._batch(rows, len(indices), int(self._lengths[split][indices].max()))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Batches of an epoch [batches, rows]: like lengths together, in random order; rows too few for a batch are left out."""
        draw, size = np.random.default_rng((self.flags.seed, epoch, ORDER)), self.flags.batch_size
        rows = draw.permutation(len(self._rows["train"]))
        rows = rows[: len(rows) // size * size]
        pools = [rows[start : start + POOL * size] for start in range(0, len(rows), POOL * size)]
        lengths = self._lengths["train"]
        batches = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]).reshape(-1, size)
        return batches[draw.permutation(len(batches))]

    def training_batch(self, step: int) -> Batch:
        epoch, place = divmod(step, len(self._rows["train"]) // self.flags.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return self._share("train", self._order[place], self._own)

    def peek(self) -> Batch:
        """Of rows of about the mean length."""
        lengths = self._lengths["train"]
        usual = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")[: self.flags.batch_size]
        return self._share("train", usual, self._own)

    def held_out(self, split: str, everything: bool = False) -> Iterator[Batch]:
        """All rows, the shortest first."""
        engine, size = self.engine, self.flags.eval_batch_size
        order = np.argsort(self._lengths[split], kind="stable")
        for start in range(0, len(order), size):
            some = order[start : start + size]
            own = range(len(some)) if everything else rank_lanes(len(some), engine.rank, engine.world_size, training=False)
            if len(own):
                yield self._share(split, some, own)

    @property
    def evaluation_shape(self) -> Shape:
        usual = round(float(self._lengths[self.splits[0]].mean()))
        return Shape(self.flags.eval_batch_size, self.sequences * usual, targets=1)

    def forward_flops(self, model: nn.Module, shape: Shape, k: int | None) -> int:
        """Of the pre-trained layers; those of the small head are left out."""
        read = Shape(shape.rows * self.sequences, shape.positions // self.sequences, targets=0)
        return self.architecture.forward_flops(model.backbone, read, k)

    def provenance(self) -> dict[str, Any]:
        source, flags = self.source, self.flags
        start = source.provenance(not flags.from_scratch) | self._handed_over._asdict()
        return {"pretrained": start} | ({"fold": flags.fold} if self._folds > 1 else {})
