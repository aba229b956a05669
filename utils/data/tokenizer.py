"""Tokenizers of BERT, RoBERTa and similar models, loaded with the transformers library, and their vocabulary as a corpus records it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

SPECIAL = ("cls", "sep", "mask", "pad")
MOST_PIECES = 1 << 16  # a piece is stored as uint16


@dataclass(frozen=True)
class Vocabulary:
    """The word pieces of a tokenizer: `size` ids, the ids of the special pieces, and the sha256 of the mapping from pieces to ids."""

    name: str
    size: int
    sha256: str
    cls: int
    sep: int
    mask: int
    pad: int

    @property
    def special(self) -> list[int]:
        """The ids of the special pieces, ascending."""
        return sorted({self.cls, self.sep, self.mask, self.pad})

    @classmethod
    def from_meta(cls, entry: Any) -> Vocabulary | None:
        """Build it from the entry "vocabulary" of a meta.json; None where the entry is not valid."""
        try:
            made = cls(**entry)
        except TypeError:
            return None
        ids = (made.cls, made.sep, made.mask, made.pad)
        typed = all(type(value) is int for value in (made.size, *ids)) and isinstance(made.name, str) and isinstance(made.sha256, str)
        return made if typed and min(ids) >= 0 and max(ids) < made.size <= MOST_PIECES else None


def load_tokenizer(name: str):
    """Load a fast tokenizer by its name on the Hugging Face hub, or from a folder that transformers reads: one with vocab.txt (BERT), or
    with vocab.json and merges.txt (RoBERTa), is enough.

    Raises UserError where it cannot be loaded or lacks what masked language modelling needs.
    """
    from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

    folder, kind = Path(name), AutoTokenizer
    if folder.is_dir() and not (folder / "tokenizer.json").exists():
        files = {path.name for path in folder.iterdir()}
        if not ({"vocab.txt"} <= files or {"vocab.json", "merges.txt"} <= files):
            raise UserError(f"--tokenizer {name} has neither tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt")
        kind = BertTokenizerFast if "vocab.txt" in files else RobertaTokenizerFast
    try:
        tokenizer = kind.from_pretrained(name)
    except Exception as error:  # many kinds: of the network, the hub or a parser
        reason = " ".join(str(error).split())[:300]
        remedy = "give a folder with vocab.txt, or with vocab.json and merges.txt"
        raise UserError(f"--tokenizer {name} cannot be loaded ({reason}): {remedy}") from error
    known = tokenizer.get_vocab() if kind is AutoTokenizer else _bare_vocabulary(folder)
    missing = [piece for piece in SPECIAL if getattr(tokenizer, f"{piece}_token") not in known]
    if missing or len(tokenizer) > MOST_PIECES:
        fault = f"has no {', '.join(missing)} piece" if missing else f"has {len(tokenizer):,} pieces, more than {MOST_PIECES:,}"
        raise UserError(f"--tokenizer {name} {fault}: choose one made for masked language modelling")
    return tokenizer


def _bare_vocabulary(folder: Path) -> set[str]:
    """Read the pieces of a folder without tokenizer.json, to which transformers would add special pieces that the model never saw."""
    if (folder / "vocab.txt").exists():
        return set((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    return set(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))


def vocabulary_of(tokenizer, name: str) -> Vocabulary:
    """Describe a tokenizer that was loaded as `name`."""
    content = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()
    ids = {piece: getattr(tokenizer, f"{piece}_token_id") for piece in SPECIAL}
    return Vocabulary(Path(name).name, len(tokenizer), hashlib.sha256(content).hexdigest(), **ids)
