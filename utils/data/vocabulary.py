"""Tokenizers learned from a text: its words, or byte pairs. Built with the tokenizers library; imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.data.meta import TOKENIZER
from utils.data.tokens import FILE
from utils.documents import replace
from utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END, UNKNOWN = "<eos>", "<unk>"
SPACES, PUNCTUATION, PAIRS = "words", "words_and_punctuation", "byte_pairs"
PATTERNS = {SPACES: r"\S+", PUNCTUATION: rf"{END}|{UNKNOWN}|\w+|[^\w\s]"}  # of a word
KINDS = (*PATTERNS, PAIRS)
PAIRS_SIZE = 8192


class Learned(NamedTuple):
    """A way to learn a vocabulary from the training text.

    kind: words between spaces, as WikiText has them; the same with punctuation marks as words of their own; or byte pairs.
    least: occurrences that a word needs. size: words or byte pairs at most, with END and UNKNOWN; None: all words, or PAIRS_SIZE.
    """

    kind: str
    least: int = 1
    size: int | None = None
    lower_case: bool = False

    def tokenizer(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer learned from pieces of a text.

        Words are in the order of their number, then of their first occurrence, behind END, which stands for a newline, as in the official
        code (Vocab.build_vocab); UNKNOWN stands for all others. UserError if no word is left.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        if self.kind == PAIRS:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.normalizer = normalizers.Lowercase() if self.lower_case else None
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=self.size or PAIRS_SIZE, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator(texts, trainer)
            return tokenizer
        counts = Counter()
        for text in texts:
            text = (text.lower() if self.lower_case else text).replace("\n", f" {END} ")
            counts.update(text.split() if self.kind == SPACES else re.findall(PATTERNS[self.kind], text))
        del counts[END]
        words = [END, *(word for word, count in counts.most_common() if count >= self.least)][: self.size]
        if len(words) == 1:
            raise UserError(f"no word occurs {self.least:,} times: give a smaller --min_frequency")
        if UNKNOWN not in words:
            words = [END, UNKNOWN, *words[1:]][: self.size]
        tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=UNKNOWN))
        steps = [normalizers.Lowercase()] if self.lower_case else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace("\n", f" {END} ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERNS[self.kind]), "removed", invert=True)
        return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> dict[str, Path]:
    """Save a tokenizer into a prepared folder, down to the disk; return its files by their path in the folder."""
    (folder / TOKENIZER).mkdir()
    path = folder / TOKENIZER / FILE
    replace(path, tokenizer.to_str().encode())
    return {f"{TOKENIZER}/{FILE}": path}
