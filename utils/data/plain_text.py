"""A plain text, and its parts as ids of a tokenizer. Imports no torch."""

import lzma
from collections.abc import Iterator
from typing import Any

from utils.errors import UserError


def read_text(path: str) -> str:
    """The content of a UTF-8 file, also .xz. UserError if it is none."""
    opened = lzma.open if path.endswith(".xz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"--data {path} is not a UTF-8 text: {error}") from None


def windows(text: str, tokenizer: Any, tokens: int, length: int, writes: bool) -> Iterator[list[int]]:
    """Ids of the text, `length` at a time, `tokens` in all, each part after the token that the tokenizer puts before a text, if any; of its
    lines, cut at `length`, for a model that does not write.
    """
    if writes:
        first, ids = tokenizer("")["input_ids"][:1], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        own = length - len(first)
        yield from (first + ids[begin : begin + own] for begin in range(0, max(len(ids) - own, 0) + 1, own) if len(ids) > 1)
        return
    read = 0
    for line in filter(str.strip, text.splitlines()):
        if read < tokens:
            read += len(ids := tokenizer(line, truncation=True, max_length=length)["input_ids"])
            yield ids
