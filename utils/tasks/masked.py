"""Masked language modelling: predicting hidden word pieces of a running text (Devlin et al. 2019, section 3.1).

Every sequence is [CLS] pieces [SEP], always of the full length, cut from the running text. A fixed number of its pieces, a share
--mask_rate, is chosen as targets: 80 % of them become [MASK], 10 % a random non-special piece, and 10 % stay. Masks are drawn anew in every
epoch (Liu et al. 2019, section 4.1); those of evaluation are fixed. Order and masks depend on the seed only, not on the number of
processes.
"""

import numpy as np
import torch

from utils.data.attack import draw_ordinary
from utils.data.tokenizer import Vocabulary
from utils.tasks.base import Metric
from utils.tasks.sequences import SequenceTask


class MaskedSequences:
    """A text of word pieces uint16 [N], cut into `count` sequences of `length`, each with `targets` masked pieces."""

    def __init__(self, pieces: np.ndarray, vocabulary: Vocabulary, length: int, rate: float, read: np.ndarray | None = None):
        self.read = pieces if read is None else read
        self.pieces, self.vocabulary, self.inner = pieces, vocabulary, length - 2
        self.count, self.targets = len(pieces) // self.inner, max(1, round(rate * self.inner))

    def sequence(self, index: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [length], masked places [masked] in ascending order, their original pieces [masked], all int64. `key` seeds the draw."""
        v, draw = self.vocabulary, np.random.default_rng((*key, index))
        inner = slice(index * self.inner, (index + 1) * self.inner)
        tokens = np.concatenate(([v.cls], self.read[inner].astype(np.int64), [v.sep]))
        places = np.sort(draw.choice(self.inner, self.targets, replace=False)) + 1
        targets, fate = self.pieces[inner].astype(np.int64)[places - 1], draw.random(self.targets)
        anything = draw_ordinary(draw, self.targets, v.size, v.special)
        tokens[places] = np.where(fate < 0.8, v.mask, np.where(fate < 0.9, anything, tokens[places]))
        return tokens, places, targets

    def batch(self, indices: np.ndarray, key: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Tokens [B, T], places [B, M] and targets [B, M] of some sequences."""
        columns = zip(*(self.sequence(int(index), key) for index in indices), strict=True)
        return tuple(torch.from_numpy(np.stack(column)).to(device) for column in columns)


class MaskedLanguageModelling(SequenceTask):
    metric = Metric("loss", True, lambda nats: nats)

    def cut(self, text: np.ndarray, read: np.ndarray | None = None) -> MaskedSequences:
        return MaskedSequences(text, self.corpus.vocabulary, self.flags.tgt_len, self.flags.mask_rate, read)
