"""Tokenizers of BERT, RoBERTa and their kin, by the transformers library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError


def load_tokenizer(name: str):
    """A fast tokenizer: a folder with vocab.txt (BERT) or vocab.json and merges.txt (RoBERTa), any other that transformers reads, or a name
    on the hub. UserError where there is none, or it lacks what masked language modelling needs.
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
    except Exception as error:  # of the network, the hub or a parser
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--tokenizer {name} cannot be loaded: {reason}; give a folder with vocab.txt, or vocab.json and merges.txt"
        ) from error
    known = _bare_vocabulary(folder) if kind is not AutoTokenizer else tokenizer.get_vocab()
    lacking = [piece for piece in ("cls", "sep", "mask", "pad") if getattr(tokenizer, f"{piece}_token") not in known]
    if lacking or len(tokenizer) > 1 << 16:
        fault = f"has no {', '.join(lacking)} piece" if lacking else f"has {len(tokenizer):,} pieces, more than 65,536"
        raise UserError(f"--tokenizer {name} {fault}: choose one made for masked language modelling")
    return tokenizer


def _bare_vocabulary(folder: Path) -> set[str]:
    """The pieces of a folder without tokenizer.json; transformers would add special ones that are not there."""
    if (folder / "vocab.txt").exists():
        return set((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    return set(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))


def vocabulary_of(tokenizer, name: str) -> Vocabulary:
    """What a corpus and a model have to know of a tokenizer; `name`: what it was loaded by."""
    content = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()
    ids = {piece: getattr(tokenizer, f"{piece}_token_id") for piece in ("cls", "sep", "mask", "pad")}
    return Vocabulary(Path(name).name, len(tokenizer), hashlib.sha256(content).hexdigest(), **ids)


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
