"""Base of the tasks that read a text in sequences of one length. Order and whatever is drawn depend on the seed only, not on the number of
processes.
"""

from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from utils.data.lanes import rank_lanes
from utils.errors import UserError
from utils.models.registry import Shape
from utils.tasks.base import Batch, Task

ORDER, MASKS = 1, 2  # keys of the random streams
HELD_OUT_SEED = 20230303  # the masks of evaluation are the same for every run


class SequenceTask(Task):
    """Raises UserError for a corpus too short for a batch."""

    def __init__(self, flags, corpus, engine):
        super().__init__(flags, corpus, engine)
        self._splits = {split: self.cut(getattr(corpus, split)) for split in ("train", "valid", "test")}
        self._rows = rank_lanes(flags.batch_size, engine.rank, engine.world_size)
        self._epoch_order = lru_cache(maxsize=1)(self._draw_order)
        for split, needed in (("train", flags.batch_size), ("valid", 1), ("test", 1)):
            if (count := self._splits[split].count) < needed:
                symbols = f"{len(getattr(corpus, split)):,} {corpus.unit}"
                raise UserError(
                    f"{split} of {corpus.path} has {symbols}, {count} sequences of --tgt_len {flags.tgt_len}, and {needed} are needed: "
                    "use a longer text, or a smaller --batch_size or --tgt_len"
                )

    @abstractmethod
    def cut(self, text: np.ndarray, read: np.ndarray | None = None) -> Any:
        """The sequences of a split: `count`, `targets` of each, and `batch(indices, key, device)`, whose key seeds what is drawn.

        read: the input, where it is not the text, which the targets are from.
        """

    def _shape(self, rows: int) -> Shape:
        return Shape(rows, self.flags.tgt_len, targets=self._splits["train"].targets)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.flags.seed, epoch, ORDER)).permutation(self._splits["train"].count)

    def training_batch(self, step: int) -> Batch:
        sequences, size = self._splits["train"], self.flags.batch_size
        epoch, place = divmod(step, sequences.count // size)
        chosen = self._epoch_order(epoch)[place * size : (place + 1) * size][self._rows.start : self._rows.stop]
        return Batch(sequences.batch(chosen, (self.flags.seed, epoch, MASKS), self.engine.device), self._shape(size))

    def held_out(self, split: str, everything: bool = False, attacked: bool = False) -> Iterator[Batch]:
        sequences, rows, engine = self._splits[split], self.flags.eval_batch_size, self.engine
        if attacked:
            text = getattr(self.corpus, split)
            sequences = self.cut(text, self.attack(text))
        for start in range(0, sequences.count, rows):
            whole = np.arange(start, min(start + rows, sequences.count))
            own = range(len(whole)) if everything else rank_lanes(len(whole), engine.rank, engine.world_size, training=False)
            if len(own):
                inputs = sequences.batch(whole[own.start : own.stop], (HELD_OUT_SEED, self.splits.index(split), MASKS), engine.device)
                yield Batch(inputs, self._shape(len(whole)))

    @property
    def evaluation_shape(self) -> Shape:
        return self._shape(self.flags.eval_batch_size)
