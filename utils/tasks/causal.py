"""Causal language modelling on the tokens of a model: predicting the next token in sequences that are cut from a running text.

Every sequence predicts --tgt_len tokens, and the next one goes on where it ends, so that every token is predicted once. The first token of
a sequence is predicted from the token that the tokenizer puts before a text, or, if there is none, from the one before it in the text.
"""

import numpy as np
import torch

from utils.tasks.base import perplexity_of
from utils.tasks.sequences import SequenceTask


class TokenSequences:
    """A text of tokens uint32 [N], cut into `count` sequences of `targets` tokens. first: the token before each, or None."""

    def __init__(self, tokens: np.ndarray, length: int, first: int | None, read: np.ndarray | None = None):
        self.read = tokens if read is None else read
        self.tokens, self.targets, self.first = tokens, length, np.array([] if first is None else [first], np.int64)
        self.count = (len(tokens) - (first is None)) // length

    def batch(self, indices: np.ndarray, key: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and the token after each, int64 [B, targets]. Nothing is drawn."""
        starts, length = [int(index) * self.targets for index in indices], self.targets + (len(self.first) == 0)

        def rows(text: np.ndarray) -> torch.Tensor:
            found = [np.concatenate([self.first, text[start : start + length]]).astype(np.int64) for start in starts]
            return torch.from_numpy(np.stack(found)).to(device)

        return rows(self.read)[:, :-1].contiguous(), rows(self.tokens)[:, 1:].contiguous()


class CausalLanguageModelling(SequenceTask):
    """Measures perplexity per token."""

    def __init__(self, flags, corpus, engine):
        super().__init__(flags, corpus, engine)
        self.metric = perplexity_of(corpus)

    def cut(self, text: np.ndarray, read: np.ndarray | None = None) -> TokenSequences:
        return TokenSequences(text, self.flags.tgt_len, self.corpus.vocabulary.first, read)
