"""Encodes the rows of a fine-tuning task as the model reads them: bytes as in its pre-training, or word pieces."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from utils.checkpoints.origin import Source
from utils.data.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from utils.errors import UserError
from utils.flags.fields import FinetuneFlags
from utils.flags.models import MODELS


class RowEncoder(ABC):
    """pad: the token after a row's end. vocabulary: of the word pieces, or None for bytes."""

    pad: int = 0
    vocabulary: Vocabulary | None = None

    @abstractmethod
    def encode(self, sequences: list[tuple[str, ...]]) -> list[np.ndarray]:
        """Each sequence of texts as one row of tokens int64 [T], terminated by an end token."""


class ByteEncoder(RowEncoder):
    """UTF-8, with a newline after each text."""

    def encode(self, sequences: list[tuple[str, ...]]) -> list[np.ndarray]:
        joined = ("".join(f"{text}\n" for text in texts).encode() for texts in sequences)
        return [np.frombuffer(content, np.uint8).astype(np.int64) for content in joined]


class PieceEncoder(RowEncoder):
    """[CLS] text [SEP] text [SEP], by the model's tokenizer."""

    def __init__(self, folder: str):
        self._tokenizer = load_tokenizer(folder)
        self.vocabulary = vocabulary_of(self._tokenizer, folder)
        self.pad = self.vocabulary.pad

    def encode(self, sequences: list[tuple[str, ...]]) -> list[np.ndarray]:
        columns = [list(texts) for texts in zip(*sequences, strict=True)]
        found = self._tokenizer(*columns, return_attention_mask=False, split_special_tokens=True)["input_ids"]
        return [np.array(ids, np.int64) for ids in found]


def encoder_of(flags: FinetuneFlags, source: Source) -> RowEncoder:
    """UserError if the checkpoint's tokenizer is missing or differs."""
    if MODELS[flags.model].reads == "bytes":
        return ByteEncoder()
    folder = flags.tokenizer or str(Path(source.flags.get("data") or "") / "tokenizer")
    if flags.tokenizer is None and not Path(folder).is_dir():
        raise UserError(f"the tokenizer of {source.path} is not at {folder}: give its folder, or its name on the hub, with --tokenizer")
    encoder = PieceEncoder(folder)
    if (known := source.flags.get("vocabulary_sha256")) and known != encoder.vocabulary.sha256:
        raise UserError(f"{source.path} was trained with another tokenizer than that of {folder}: give that one with --tokenizer")
    return encoder
