"""Prepared texts. Importing this module does not import torch: `Corpus.open` checks the data before anything slow starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np

from utils.data.sources import PYSTDLIB, TEXTS
from utils.data.tokenizer import Vocabulary
from utils.errors import UserError

SCHEMA = 1
META = "meta.json"
SPLITS = ("train", "valid", "test")
CHUNK = 1 << 22  # bytes read at once; keeps memory flat for texts of any size


class Unit(NamedTuple):
    """A kind of symbol: how the splits store it, and the arguments of the program that prepares such a text."""

    dtype: np.dtype
    program: str
    arguments: str


UNITS = {
    "bytes": Unit(np.dtype("u1"), "data/prepare.py", "--source FILE"),
    "pieces": Unit(np.dtype("<u2"), "data/prepare_pieces.py", "--tokenizer T --data_files FILE"),
}


def split_file(folder: Path, split: str) -> Path:
    """Return the file with the symbols of `split` in a prepared folder."""
    return folder / f"{split}.bin"


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, at most CHUNK bytes at a time."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest_of(chunks: Iterable[bytes], algorithm: str) -> tuple[int, str]:
    """Return the total size of `chunks` in bytes and their hash in hex."""
    size, digest = 0, hashlib.new(algorithm, usedforsecurity=False)
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _refuse(fault: str, name: str, unit: str, force: bool = True) -> NoReturn:
    """Raise UserError with the command that prepares the text as the remedy."""
    _, program, arguments = UNITS[unit]
    source = "" if unit == "bytes" and name in (*TEXTS, PYSTDLIB) else f" {arguments}"
    command = f"`python {program} {name or 'NAME'}{source}{' --force' if force else ''}`"
    raise UserError(f"{fault}: prepare {'it again' if force else 'one'} with {command}") from None


def _unit(meta: Any) -> str:
    return "pieces" if isinstance(meta, dict) and "vocabulary" in meta else "bytes"


def _meta_fault(meta: Any) -> str | None:
    """Return why `meta` is not a meta.json of this version, or None."""
    if not isinstance(meta, dict):
        return "is not a JSON object"
    if meta.get("schema") != SCHEMA:
        return f"has schema {meta.get('schema')!r}, this program reads schema {SCHEMA}"
    for key in ("name", "title", "source"):
        if not isinstance(meta.get(key), str):
            return f"lacks the string {key!r}"
    if not isinstance(meta.get("official_text"), bool):
        return "lacks the boolean 'official_text'"
    if "vocabulary" in meta and Vocabulary.from_meta(meta["vocabulary"]) is None:
        return "has a 'vocabulary' without name, size, sha256 and ids of this version"
    splits = meta.get("splits")
    for split in SPLITS:
        entry = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            return f"lacks the bytes and sha256 of {split!r}"
    return None


def _read_meta(folder: Path, unit: str) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_file():
            raise UserError(f"{folder} is a file: prepare it with `python {UNITS[unit].program} NAME ...`, then give data/NAME") from None
        _refuse(f"{folder} is not a prepared text, it has no {META}", folder.name, unit, force=False)
    except ValueError as error:  # bad JSON or bad UTF-8
        _refuse(f"{path} is not readable as JSON ({error})", folder.name, unit)
    if fault := _meta_fault(meta):
        _refuse(f"{path} {fault}", folder.name, unit)
    return meta


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
    """A folder written by data/prepare.py (bytes) or data/prepare_pieces.py (word pieces), with its splits as read-only arrays on disk."""

    path: Path
    meta: dict[str, Any]
    train: np.memmap  # uint8 [bytes] or uint16 [pieces], as the other splits
    valid: np.memmap
    test: np.memmap
    notes: ClassVar[str] = ""

    @classmethod
    def open(cls, path: str | Path, unit: str | None = None) -> Corpus:
        """Open the folder `path` after checking meta.json and the size of each split, without reading the text.

        Raises UserError if a file is missing, damaged, or not of the size recorded in meta.json, or if the text is not in `unit`, the units
        that the caller reads ("bytes" or "pieces", None: either).
        """
        folder = Path(path)
        try:
            meta = _read_meta(folder, unit or "bytes")
            if unit not in (None, _unit(meta)):
                _refuse(f"{folder} holds {_unit(meta)}, and the model reads {unit}", "NAME", unit, force=False)
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
        """The symbols of the text, "bytes" or "pieces": what a model `reads`."""
        return _unit(self.meta)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of the word pieces, None for bytes."""
        return Vocabulary.from_meta(self.meta["vocabulary"]) if "vocabulary" in self.meta else None

    @property
    def sizes(self) -> dict[str, int]:
        """The number of bytes or pieces of each split."""
        return {split: len(getattr(self, split)) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """The sha256, in hex, over the recorded hashes of the three splits: equal for equal content."""
        return hashlib.sha256("".join(self.meta["splits"][split]["sha256"] for split in SPLITS).encode()).hexdigest()

    def verify(self) -> None:
        """Read every byte. Raises UserError if the sha256 of a split is not the recorded one."""
        for split in SPLITS:
            path, expected = split_file(self.path, split), self.meta["splits"][split]["sha256"]
            _, found = digest_of(read_chunks(path), "sha256")
            if found != expected:
                _refuse(f"{path} has sha256 {found}, {META} says {expected}", self.name, self.unit)
