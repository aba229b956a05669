"""Causal language modelling on the tokens of a model: predicting the next token in sequences that are cut from a running text.

Every sequence predicts --tgt_len tokens, and the next one goes on where it ends, so that every token is predicted once. The first token of
a sequence is predicted from the token that the tokenizer puts before a text, or, if there is none, it is the last one of the sequence
before. The order of an epoch depends on the seed only, not on the number of processes.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from utils.data.lanes import rank_lanes
from utils.errors import UserError
from utils.models.registry import Shape
from utils.tasks.base import Batch, Metric, Task

ORDER = 1  # key of the random stream


class TokenSequences:
    """A text of tokens uint32 [N], cut into `count` sequences of `length`. first: the token before each, or None."""

    def __init__(self, tokens: np.ndarray, length: int, first: int | None):
        self.tokens, self.length, self.first = tokens, length, first
        self.count = (len(tokens) - (first is None)) // length

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and the token after each, int64 [B, length]."""
        rows = []
        for index in indices:
            start = int(index) * self.length
            if self.first is None:
                rows.append(self.tokens[start : start + self.length + 1].astype(np.int64))
            else:
                rows.append(np.concatenate([[self.first], self.tokens[start : start + self.length]]).astype(np.int64))
        both = torch.from_numpy(np.stack(rows)).to(device)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class CausalLanguageModelling(Task):
    """Measures perplexity per token, and bits per byte of the text, by which models of other tokens can be compared. UserError for a corpus
    too short for a batch.
    """

    def __init__(self, flags, corpus, engine):
        super().__init__(flags, corpus, engine)
        self.metric = Metric("perplexity", True, math.exp, also=self._per_byte)
        first, length = corpus.vocabulary.first, flags.tgt_len
        self._splits = {split: TokenSequences(getattr(corpus, split), length, first) for split in ("train", "valid", "test")}
        self._rows = rank_lanes(flags.batch_size, engine.rank, engine.world_size)
        self._epoch_order = lru_cache(maxsize=1)(self._draw_order)
        for split, needed in (("train", flags.batch_size), ("valid", 1), ("test", 1)):
            if (count := self._splits[split].count) < needed:
                raise UserError(
                    f"{split} of {corpus.path} has {len(getattr(corpus, split)):,} tokens, {count} sequences of --tgt_len {length}, and "
                    f"{needed} are needed: use a longer text, or a smaller --batch_size or --tgt_len"
                )

    def _per_byte(self, split: str, nats: float) -> dict[str, float]:
        """Bits per byte: those per token times the tokens of a byte, on average over the split."""
        return {"bits_per_byte": nats / math.log(2) * len(getattr(self.corpus, split)) / self.corpus.meta["text_bytes"][split]}

    def _shape(self, rows: int) -> Shape:
        return Shape(rows, self.flags.tgt_len, targets=self.flags.tgt_len)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.flags.seed, epoch, ORDER)).permutation(self._splits["train"].count)

    def training_batch(self, step: int) -> Batch:
        sequences, size = self._splits["train"], self.flags.batch_size
        epoch, place = divmod(step, sequences.count // size)
        chosen = self._epoch_order(epoch)[place * size : (place + 1) * size][self._rows.start : self._rows.stop]
        return Batch(sequences.batch(chosen, self.engine.device), self._shape(size))

    def held_out(self, split: str, everything: bool = False) -> Iterator[Batch]:
        sequences, rows, engine = self._splits[split], self.flags.eval_batch_size, self.engine
        for start in range(0, sequences.count, rows):
            whole = np.arange(start, min(start + rows, sequences.count))
            own = range(len(whole)) if everything else rank_lanes(len(whole), engine.rank, engine.world_size, training=False)
            if len(own):
                yield Batch(sequences.batch(whole[own.start : own.stop], engine.device), self._shape(len(whole)))

    @property
    def evaluation_shape(self) -> Shape:
        return self._shape(self.flags.eval_batch_size)
