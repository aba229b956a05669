"""Encodes the rows of a fine-tuning task in the units of pre-training: bytes, word pieces or tokens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.checkpoints.origin import Source
from utils.data.meta import TOKENIZER, Tokens
from utils.data.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from utils.data.tokens import load_tokens
from utils.errors import UserError
from utils.flags.fields import FinetuneFlags
from utils.flags.models import MODELS


class RowEncoder(NamedTuple):
    """encode: turns each sequence of texts into a row of tokens int64 [T], terminated by an end token. pad: the token after a row's end.
    vocabulary: of the word pieces or tokens, or None for bytes.
    """

    encode: Callable[[list[tuple[str, ...]]], list[np.ndarray]]
    pad: int = 0
    vocabulary: Vocabulary | Tokens | None = None


def encode_bytes(sequences: list[tuple[str, ...]]) -> list[np.ndarray]:
    """UTF-8, with a newline after each text."""
    joined = ("".join(f"{text}\n" for text in texts).encode() for texts in sequences)
    return [np.frombuffer(content, np.uint8).astype(np.int64) for content in joined]


def encode_pieces(sequences: list[tuple[str, ...]], tokenizer) -> list[np.ndarray]:
    """[CLS] text [SEP] text [SEP], by the model's tokenizer."""
    columns = [list(texts) for texts in zip(*sequences, strict=True)]
    found = tokenizer(*columns, return_attention_mask=False, split_special_tokens=True)["input_ids"]
    return [np.array(ids, np.int64) for ids in found]


def encode_tokens(sequences: list[tuple[str, ...]], tokenizer) -> list[np.ndarray]:
    """The texts with the special tokens that the tokenizer puts around them; without any, a newline after each text as in bytes."""
    if not tokenizer.num_special_tokens_to_add(len(sequences[0]) > 1):
        sequences = [("".join(f"{text}\n" for text in texts),) for texts in sequences]
    found = tokenizer.encode_batch([texts if len(texts) > 1 else texts[0] for texts in sequences])
    return [np.array(encoded.ids, np.int64) for encoded in found]


def encoder_of(flags: FinetuneFlags, source: Source) -> RowEncoder:
    """UserError if the checkpoint's tokenizer is missing or differs."""
    model, known = MODELS[flags.model], source.flags.get("vocabulary_sha256")
    if "bytes" in model.reads and known is None:
        return RowEncoder(encode_bytes)
    folder = flags.tokenizer or str(source.weights.parent if model.from_folder else Path(source.flags.get("data") or "") / TOKENIZER)
    if "tokens" in model.reads:
        tokenizer, vocabulary = load_tokens(Path(folder))
        if known not in (None, vocabulary.sha256):
            raise UserError(f"the tokenizer in {folder} is not that of {source.path}: give its folder with --tokenizer")
        return RowEncoder(partial(encode_tokens, tokenizer=tokenizer), vocabulary=vocabulary)
    if flags.tokenizer is None and not Path(folder).is_dir():
        raise UserError(f"the tokenizer of {source.path} is not at {folder}: give its folder, or its name on the hub, with --tokenizer")
    tokenizer = load_tokenizer(folder)
    vocabulary = vocabulary_of(tokenizer, folder)
    if known not in (None, vocabulary.sha256):
        raise UserError(f"{source.path} was trained with another tokenizer than that of {folder}: give that one with --tokenizer")
    return RowEncoder(partial(encode_pieces, tokenizer=tokenizer), vocabulary.pad, vocabulary)
