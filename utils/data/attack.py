"""Corrupted symbols of a held-out text or row, for tests of robustness: the model reads them, and is scored on the true ones.

Follow-ups of SMoE-Dropout (MomentumSMoE, arXiv 2410.14574) test on WikiText-103 with words swapped for a generic token. The rate is ours.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.meta import TOKENIZER, Tokens, Vocabulary
from utils.data.tokens import load_tokens
from utils.data.vocabulary import UNKNOWN
from utils.errors import UserError

ATTACKS = SWAP, RANDOM = "swap", "random"
SEED = 20230303  # the same symbols are hit in every run
BYTES = 256


def draw_ordinary(draw: np.random.Generator, count: int, size: int, special: list[int]) -> np.ndarray:
    """Draw `count` of the symbols below `size`, int64, uniformly and none of the `special` ones, which ascend."""
    drawn = draw.integers(0, size - len(special), count)
    for symbol in special:  # in ascending order, which skips special symbols and keeps the draw uniform
        drawn += drawn >= symbol
    return drawn


class Attack(NamedTuple):
    """rate: share of the symbols that is replaced. generic: the one symbol in their place; None: any of `size`, at random. Special symbols
    stay.
    """

    rate: float
    generic: int | None
    size: int
    special: list[int]

    def __call__(self, symbols: np.ndarray, key: int = 0) -> np.ndarray:
        """The symbols [N] after the attack, of the same kind. `key`: of the row, so that rows differ."""
        draw = np.random.default_rng((SEED, key))
        hit = (draw.random(len(symbols)) < self.rate) & ~np.isin(symbols, self.special)
        other = draw_ordinary(draw, len(symbols), self.size, self.special) if self.generic is None else self.generic
        return np.where(hit, other, symbols).astype(symbols.dtype)


def attack_of(kind: str | None, rate: float, vocabulary: Vocabulary | Tokens | None, text: Path) -> Attack | None:
    """The attack of a kind, one of ATTACKS or none, on the symbols of a vocabulary, or bytes. text: its folder.

    UserError where a word is to be swapped and the vocabulary has no generic one.
    """
    if kind is None:
        return None
    generic, path = None, text / TOKENIZER
    if kind == SWAP:
        generic = load_tokens(path)[0].token_to_id(UNKNOWN) if isinstance(vocabulary, Tokens) and path.is_dir() else None
        if generic is None:
            raise UserError(
                f"--attack {SWAP} needs a text of words, whose vocabulary has {UNKNOWN}, and {text} has none: use another attack"
            )
    size = vocabulary.size if vocabulary else BYTES
    return Attack(rate, generic, size, vocabulary.special if isinstance(vocabulary, Vocabulary) else [])
