"""Prepared texts. Importing this module does not import torch: `Corpus.open` checks the data before anything slow starts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import msgspec
import numpy as np

from utils import documents
from utils.data.meta import (
    META,
    SPLITS,
    TOKENIZER,
    TextMeta,
    Tokens,
    Vocabulary,
    fault_of,
    tokenizer_fault,
)
from utils.data.sources import PYSTDLIB, TEXTS
from utils.errors import UserError


class Unit(NamedTuple):
    """A kind of symbol: how the splits store it, and the arguments of the program that prepares such a text."""

    dtype: np.dtype
    program: str
    arguments: str


UNITS = {
    "bytes": Unit(np.dtype("u1"), "data/prepare.py", "--source FILE"),
    "pieces": Unit(np.dtype("<u2"), "data/prepare_pieces.py", "--tokenizer T --data_files FILE"),
    "tokens": Unit(np.dtype("<u4"), "data/prepare.py", "--tokenizer FOLDER --source FILE"),
}


def split_file(folder: Path, split: str) -> Path:
    """Return the file with the symbols of `split` in a prepared folder."""
    return folder / f"{split}.bin"


def _command(name: str, unit: str, force: bool) -> str:
    """The command that prepares a text, as a remedy."""
    _, program, arguments = UNITS[unit]
    source = "" if unit == "bytes" and name in (*TEXTS, PYSTDLIB) else f" {arguments}"
    command = f"`python {program} {name or 'NAME'}{source}{' --force' if force else ''}`"
    return f"prepare {'it again' if force else 'one'} with {command}"


def _refuse(fault: str, name: str, unit: str, force: bool = True) -> NoReturn:
    """Raise UserError with the command that prepares the text as the remedy."""
    raise UserError(f"{fault}: {_command(name, unit, force)}")


def _unit(meta: dict[str, Any]) -> str:
    return "pieces" if "vocabulary" in meta else "tokens" if "tokens" in meta else "bytes"


def _read_meta(folder: Path, unit: str) -> dict[str, Any]:
    path = folder / META
    if folder.is_file():
        raise UserError(f"{folder} is a file: prepare it with `python {UNITS[unit].program} NAME ...`, then give data/NAME")
    if not path.exists():
        _refuse(f"{folder} is not a prepared text, it has no {META}", folder.name, unit, force=False)
    return documents.read(path, TextMeta, _command(folder.name, unit, force=True), documents.note_unverified)


def _open_split(folder: Path, split: str, meta: dict[str, Any]) -> np.memmap:
    path, expected, dtype = split_file(folder, split), meta["splits"][split]["bytes"], UNITS[_unit(meta)].dtype
    found = path.stat().st_size if path.is_file() else None
    if found != expected or not found or found % dtype.itemsize:
        fault = "is missing" if found is None else f"has {found:,} bytes"
        each = f", {dtype.itemsize} for each symbol" if dtype.itemsize > 1 else ""
        _refuse(f"{path} {fault}, {META} says {expected:,} bytes{each}", meta["name"], _unit(meta))
    return np.memmap(path, dtype, mode="r")


@dataclass(frozen=True)
class Corpus:
    """A folder written by data/prepare.py (bytes, tokens) or data/prepare_pieces.py (word pieces); its splits are read-only arrays."""

    path: Path
    meta: dict[str, Any]
    train: np.memmap  # uint8 [bytes], uint16 [pieces] or uint32 [tokens], as the other splits
    valid: np.memmap
    test: np.memmap
    notes: ClassVar[str] = ""

    @classmethod
    def open(cls, path: str | Path, units: Collection[str] = tuple(UNITS)) -> Corpus:
        """Open the folder `path` after checking meta.json and the size of each split, without reading the text.

        Raises UserError if a file is missing, damaged, or not of the size recorded in meta.json, or if the text is in none of `units`,
        those that the caller reads (keys of UNITS).
        """
        folder = Path(path)
        try:
            first = next(iter(units))
            meta = _read_meta(folder, "pieces" if len(units) == len(UNITS) and (folder / TOKENIZER).is_dir() else first)
            if _unit(meta) not in units:
                _refuse(f"{folder} holds {_unit(meta)}, and the model reads {' or '.join(units)}", "NAME", first, force=False)
            return cls(folder, meta, *(_open_split(folder, split, meta) for split in SPLITS))
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from None

    @property
    def name(self) -> str:
        """The name it was prepared under, e.g. "enwik8"."""
        return self.meta["name"]

    @property
    def title(self) -> str:
        """The name used in tables."""
        return self.meta["title"]

    @property
    def unit(self) -> str:
        """The symbols of the text, a key of UNITS: what a model `reads`."""
        return _unit(self.meta)

    @property
    def unit_in_words(self) -> str:
        return "word pieces" if self.unit == "pieces" else self.unit

    @property
    def vocabulary(self) -> Vocabulary | Tokens | None:
        """The vocabulary of the word pieces or tokens, None for bytes."""
        if "tokens" in self.meta:
            return msgspec.convert(self.meta["tokens"], Tokens)
        return msgspec.convert(self.meta["vocabulary"], Vocabulary) if "vocabulary" in self.meta else None

    @property
    def sizes(self) -> dict[str, int]:
        """The number of symbols of each split."""
        return {split: len(getattr(self, split)) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """The sha256, in hex, over the recorded hashes of the three splits: equal for equal content."""
        return hashlib.sha256("".join(self.meta["splits"][split]["sha256"] for split in SPLITS).encode()).hexdigest()

    def verify(self) -> None:
        """Read every byte. Raises UserError if the sha256 of a file is not the recorded one, or the tokenizer has other files."""
        splits = {split_file(self.path, split).name: self.meta["splits"][split] for split in SPLITS}
        if fault := fault_of(self.path, splits, META, content=True) or tokenizer_fault(self.path, self.meta):
            _refuse(fault, self.name, self.unit)
