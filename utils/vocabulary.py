"""The vocabulary of a corpus of word pieces, as its meta.json has it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Vocabulary:
    """name: of the tokenizer. size: ids are 0..size - 1. sha256: of its files. cls, sep, mask, pad: ids of the special pieces."""

    name: str
    size: int
    sha256: str
    cls: int
    sep: int
    mask: int
    pad: int

    @property
    def special(self) -> list[int]:
        """The special pieces' ids, ascending."""
        return sorted({self.cls, self.sep, self.mask, self.pad})

    @classmethod
    def from_meta(cls, entry: Any) -> Vocabulary | None:
        """The entry "vocabulary" of a meta.json, or None where it is none of this version."""
        try:
            made = cls(**entry)
        except TypeError:
            return None
        ids = (made.cls, made.sep, made.mask, made.pad)
        whole = all(type(value) is int for value in (made.size, *ids)) and isinstance(made.name, str) and isinstance(made.sha256, str)
        return made if whole and min(ids) >= 0 and max(ids) < made.size <= 1 << 16 else None
