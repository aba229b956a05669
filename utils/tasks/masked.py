"""Masked language modelling: predicting hidden word pieces of a running text (Devlin et al. 2019, section 3.1).

Every sequence is [CLS] pieces [SEP], always of the full length, cut from the running text. A fixed number of its pieces, a share
--mask_rate, is chosen as targets: 80 % of them become [MASK], 10 % a random non-special piece, and 10 % stay. Masks are drawn anew in every
epoch (Liu et al. 2019, section 4.1); those of evaluation are fixed. Order and masks depend on the seed only, not on the number of
processes.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from utils.data.lanes import rank_lanes
from utils.data.tokenizer import Vocabulary
from utils.errors import UserError
from utils.models.registry import Shape
from utils.tasks.base import Batch, Metric, Task

ORDER, MASKS = 1, 2  # keys of the random streams
HELD_OUT_SEED = 20230303  # the masks of evaluation are the same for every run


class MaskedSequences:
    """A text of word pieces uint16 [N], cut into `count` sequences of `length`, each with `masked` targets."""

    def __init__(self, pieces: np.ndarray, vocabulary: Vocabulary, length: int, rate: float):
        self.pieces, self.vocabulary, self.inner = pieces, vocabulary, length - 2
        self.count, self.masked = len(pieces) // self.inner, max(1, round(rate * self.inner))

    def sequence(self, index: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [length], masked places [masked] in ascending order, their original pieces [masked], all int64. `key` seeds the draw."""
        v, draw = self.vocabulary, np.random.default_rng((*key, index))
        inner = self.pieces[index * self.inner : (index + 1) * self.inner].astype(np.int64)
        tokens = np.concatenate(([v.cls], inner, [v.sep]))
        places = np.sort(draw.choice(self.inner, self.masked, replace=False)) + 1
        targets, fate = tokens[places], draw.random(self.masked)
        anything = draw.integers(0, v.size - len(v.special), self.masked)
        for special in v.special:  # in ascending order, which skips special pieces and keeps the draw uniform
            anything += anything >= special
        tokens[places] = np.where(fate < 0.8, v.mask, np.where(fate < 0.9, anything, targets))
        return tokens, places, targets

    def batch(self, indices: np.ndarray, key: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Tokens [B, T], places [B, M] and targets [B, M] of some sequences."""
        columns = zip(*(self.sequence(int(index), key) for index in indices), strict=True)
        return tuple(torch.from_numpy(np.stack(column)).to(device) for column in columns)


class MaskedLanguageModelling(Task):
    """Raises UserError for a corpus too short for a batch."""

    metric = Metric("loss", True, lambda nats: nats)

    def __init__(self, flags, corpus, engine):
        super().__init__(flags, corpus, engine)
        self._splits = {
            split: MaskedSequences(getattr(corpus, split), corpus.vocabulary, flags.tgt_len, flags.mask_rate)
            for split in ("train", "valid", "test")
        }
        self._rows = rank_lanes(flags.batch_size, engine.rank, engine.world_size)
        self._epoch_order = lru_cache(maxsize=1)(self._draw_order)
        for split, needed in (("train", flags.batch_size), ("valid", 1), ("test", 1)):
            if (count := self._splits[split].count) < needed:
                pieces = f"{len(getattr(corpus, split)):,} pieces"
                raise UserError(
                    f"{split} of {corpus.path} has {pieces}, {count} sequences of --tgt_len {flags.tgt_len}, and {needed} are needed: "
                    "use a longer text, or a smaller --batch_size or --tgt_len"
                )

    def _shape(self, rows: int) -> Shape:
        return Shape(rows, self.flags.tgt_len, targets=self._splits["train"].masked)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.flags.seed, epoch, ORDER)).permutation(self._splits["train"].count)

    def training_batch(self, step: int) -> Batch:
        sequences, size = self._splits["train"], self.flags.batch_size
        epoch, place = divmod(step, sequences.count // size)
        chosen = self._epoch_order(epoch)[place * size : (place + 1) * size][self._rows.start : self._rows.stop]
        return Batch(sequences.batch(chosen, (self.flags.seed, epoch, MASKS), self.engine.device), self._shape(size))

    def held_out(self, split: str, everything: bool = False) -> Iterator[Batch]:
        sequences, rows, engine = self._splits[split], self.flags.eval_batch_size, self.engine
        for start in range(0, sequences.count, rows):
            whole = np.arange(start, min(start + rows, sequences.count))
            own = range(len(whole)) if everything else rank_lanes(len(whole), engine.rank, engine.world_size, training=False)
            if len(own):
                inputs = sequences.batch(whole[own.start : own.stop], (HELD_OUT_SEED, self.splits.index(split), MASKS), engine.device)
                yield Batch(inputs, self._shape(len(whole)))

    @property
    def evaluation_shape(self) -> Shape:
        return self._shape(self.flags.eval_batch_size)
