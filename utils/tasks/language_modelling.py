"""Language modelling: predicting the next byte or token of a text that is read in order, with memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from mem_transformer import Cache
from utils.data.lanes import Lanes, VariedLanes, rank_lanes
from utils.models.registry import Shape
from utils.tasks.base import Batch, Metric, Task, perplexity_of

LN2 = math.log(2)


class LanguageModelling(Task):
    """Reads the corpus in parallel lanes. UserError for one too short for its lanes."""

    metric = Metric("bpc", True, lambda nats: nats / LN2)

    def __init__(self, flags, corpus, engine):
        super().__init__(flags, corpus, engine)
        if self.vocabulary:
            self.metric = perplexity_of(corpus)
        own = rank_lanes(flags.batch_size, engine.rank, engine.world_size)
        lanes = partial(VariedLanes, seed=flags.seed) if flags.varlen else Lanes
        self._training = lanes(corpus.train, flags.batch_size, flags.tgt_len, engine.device, own)
        for split in ("valid", "test"):
            self._lanes(split, range(flags.eval_batch_size))  # a text that is too short fails now, not after training

    def _lanes(self, split: str, lanes: range, attacked: bool = False) -> Lanes:
        flags, text = self.flags, getattr(self.corpus, split)
        how = (flags.eval_batch_size, flags.eval_tgt_len, self.engine.device, lanes, "--eval_batch_size")
        return Lanes(text, *how, self.attack(text) if attacked else None)

    @staticmethod
    def _batch(lanes: Lanes, index: int, rows: int) -> Batch:
        tokens, targets = lanes[index]
        return Batch((tokens, targets), Shape(rows, tokens.shape[1], targets=tokens.shape[1]), first=index == 0)

    def training_batch(self, step: int) -> Batch:
        return self._batch(self._training, self._training.at(step), self.flags.batch_size)

    def held_out(self, split: str, everything: bool = False, attacked: bool = False) -> Iterator[Batch]:
        rows = self.flags.eval_batch_size
        own = range(rows) if everything else rank_lanes(rows, self.engine.rank, self.engine.world_size, training=False)
        if len(own):
            lanes = self._lanes(split, own, attacked)
            yield from (self._batch(lanes, index, rows) for index in range(len(lanes)))

    def measure(self, model: nn.Module, batch: Batch, state: Cache | None) -> tuple[float, int, Cache]:
        tokens_BT, targets_BT = batch.inputs
        with self.engine.autocast():
            losses, cache = model.read(tokens_BT, state, targets_BT)
        return losses.double().sum().item(), losses.numel(), cache

    @property
    def evaluation_memory(self) -> int:
        """Positions of memory in evaluation, so that segment and memory together are as long as in training."""
        flags = self.flags
        return flags.mem_len + flags.tgt_len - flags.eval_tgt_len if flags.mem_len else 0

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        """Sets the memory length of evaluation."""
        mem_len, model.mem_len = model.mem_len, self.evaluation_memory
        try:
            yield
        finally:
            model.mem_len = mem_len

    @property
    def evaluation_shape(self) -> Shape:
        flags = self.flags
        return Shape(flags.eval_batch_size, flags.eval_tgt_len, self.evaluation_memory, flags.eval_tgt_len)
