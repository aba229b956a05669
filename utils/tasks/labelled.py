"""Base of fine-tuning tasks: labelled rows, batched with others of similar length. Subclasses encode and score rows.

Rows are independent: no memory is carried from one to the next. Rows are padded at the end; no prediction sees the padding,
but a load-balance loss counts it. Batches depend on the seed only, and each process takes its share of every batch.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.data.lanes import rank_lanes
from utils.data.rows import Examples
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import FinetuneFlags
from utils.models.registry import Shape
from utils.tasks.base import Batch, Task
from utils.tasks.encoding import RowEncoder

ORDER = 1  # key of the random stream that orders rows
POOL = 50  # batches whose rows are sorted by length together


class LabelledTask(Task):
    """Raises UserError for a row longer than --max_length, and for fewer training rows than a batch has.

    sequences: number of sequences in a row, each read separately.
    """

    selects_best = False
    sequences = 1

    def __init__(self, flags: FinetuneFlags, examples: Examples, engine: Engine, encoder: RowEncoder):
        super().__init__(flags, examples, engine, encoder.vocabulary)
        self.encoder, self.splits = encoder, (examples.split,)
        self._rows = {"train": self.read(examples.train), examples.split: self.read(examples.held_out)}
        self._lengths = {split: np.array([self.length(row) for row in rows]) for split, rows in self._rows.items()}
        self._own = rank_lanes(flags.batch_size, engine.rank, engine.world_size)
        self._epoch_order = lru_cache(maxsize=1)(self._draw_order)
        for split, lengths in self._lengths.items():
            if (longest := int(lengths.max())) > flags.max_length:
                row = f"row {int(lengths.argmax()) + 1} of {split} of {examples.path} has {longest} positions"
                raise UserError(f"{row}, and --max_length is {flags.max_length}: raise it, or shorten the row")
        if (count := len(self._rows["train"])) < flags.batch_size:
            raise UserError(f"train of {examples.path} has {count} rows, and --batch_size is {flags.batch_size}: use a smaller one")

    @property
    def tokens_sha256(self) -> str:
        """A hash of all rows as tokens, which depend on more files of a tokenizer than its vocabulary."""
        sequences = (tokens for rows in self._rows.values() for tokens, *_ in rows)
        return hashlib.sha256(b"".join(np.concatenate(one) if isinstance(one, list) else one for one in sequences)).hexdigest()

    @abstractmethod
    def read(self, examples: list) -> list:
        """Encodes the rows of a split."""

    @abstractmethod
    def length(self, row: Any) -> int:
        """Positions of the longest sequence of a row."""

    @abstractmethod
    def collate(self, rows: list, length: int) -> tuple[Tensor, ...]:
        """The model's arguments for some rows, padded to T = `length`; the first are the tokens [B, ..., T]."""

    def sequences_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens [N, T] of a batch, and their lengths without padding [N]."""
        return batch.inputs[0], torch.tensor([self.length(row) for row in batch.rows], device=self.engine.device)

    def _attacked(self, index: int, row: tuple) -> tuple:
        """A row with its sequences, which come first, corrupted."""
        tokens, *others = row
        if isinstance(tokens, list):
            return [self.attack(one, index) for one in tokens], *others
        return self.attack(tokens, index), *others

    def _batch(self, split: str, indices: np.ndarray, own: range, attacked: bool = False) -> Batch:
        """The rows `own` of a batch, padded to its longest row of all processes, so that counts do not depend on their number."""
        rows = [self._rows[split][index] for index in indices[own.start : own.stop]]
        if attacked:
            rows = [self._attacked(int(index), row) for index, row in zip(indices[own.start : own.stop], rows, strict=True)]
        inputs = self.collate(rows, int(self._lengths[split][indices].max()))
        shape = Shape(len(indices), inputs[0].numel() // len(rows), targets=1, sequences=self.sequences)
        return Batch(tuple(tensor.to(self.engine.device) for tensor in inputs), shape, rows=rows)

    def _draw_order(self, epoch: int) -> np.ndarray:
        """Batches of an epoch [batches, rows]: rows of similar length together, in random order; an incomplete last batch is dropped."""
        draw, size = np.random.default_rng((self.flags.seed, epoch, ORDER)), self.flags.batch_size
        rows = draw.permutation(len(self._rows["train"]))
        rows = rows[: len(rows) // size * size]
        pools = [rows[start : start + POOL * size] for start in range(0, len(rows), POOL * size)]
        lengths = self._lengths["train"]
        batches = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]).reshape(-1, size)
        return batches[draw.permutation(len(batches))]

    def training_batch(self, step: int) -> Batch:
        epoch, place = divmod(step, len(self._rows["train"]) // self.flags.batch_size)
        return self._batch("train", self._epoch_order(epoch)[place], self._own)

    def peek(self) -> Batch:
        """A batch of rows of about the mean length."""
        lengths = self._lengths["train"]
        usual = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")[: self.flags.batch_size]
        return self._batch("train", usual, self._own)

    def held_out(self, split: str, everything: bool = False, attacked: bool = False) -> Iterator[Batch]:
        """All rows, the shortest first."""
        engine, size = self.engine, self.flags.eval_batch_size
        order = np.argsort(self._lengths[split], kind="stable")
        for start in range(0, len(order), size):
            some = order[start : start + size]
            own = range(len(some)) if everything else rank_lanes(len(some), engine.rank, engine.world_size, training=False)
            if len(own):
                yield self._batch(split, some, own, attacked)

    @property
    def evaluation_shape(self) -> Shape:
        usual = round(float(self._lengths[self.splits[0]].mean()))
        return Shape(self.flags.eval_batch_size, self.sequences * usual, targets=1, sequences=self.sequences)
