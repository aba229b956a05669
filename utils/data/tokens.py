"""The tokenizer in a folder of the transformers library, its tokenizer.json, read with the tokenizers library. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from smoe_dropout.files import read_object
from utils.data.meta import Tokens
from utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
# the parts that decide how a text is cut; the others concern padding, truncation, special tokens around a text, and decoding
PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def load_tokens(folder: Path) -> tuple[Tokenizer, Tokens]:
    """The tokenizer of a folder, which neither pads nor truncates and takes special tokens in a text as text, and what it is recorded as.

    Raises UserError where there is none, or it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}: save the model's fast tokenizer there, as AutoTokenizer.from_pretrained(...) has it")
    from tokenizers import Tokenizer

    try:
        stored = read_object(path)
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises no kind of its own
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:300]}): restore it from a copy") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    digest = hashlib.sha256(json.dumps({part: stored.get(part) for part in PARTS}, sort_keys=True).encode()).hexdigest()
    first = next(iter(tokenizer.encode("").ids), None)
    return tokenizer, Tokens(folder.resolve().name, tokenizer.get_vocab_size(), digest, first)
