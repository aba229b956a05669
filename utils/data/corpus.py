"""Prepared texts (`Corpus`) and the ordered lanes of Transformer-XL over them (`LaneIterator`).

Importing this module does not import torch: `Corpus.open` is a cheap check of the data before anything slow starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.data.tokenizer import Vocabulary
from utils.errors import UserError

if TYPE_CHECKING:
    pass

SCHEMA = 1
META = "meta.json"
SPLITS = ("train", "valid", "test")
BUILT_IN = ("enwik8", "text8", "pystdlib")  # what data/prepare.py makes without --source
CHUNK = 1 << 22  # bytes read at once; keeps memory flat for texts of any size


def split_file(folder: Path, split: str) -> Path:
    """Where the raw uint8 bytes of `split` are in a prepared folder."""
    return folder / f"{split}.bin"


def read_chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes in pieces of at most CHUNK bytes."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest_of(chunks: Iterable[bytes], algorithm: str) -> tuple[int, str]:
    """How many bytes `chunks` hold together, and their hash in hex."""
    size, digest = 0, hashlib.new(algorithm, usedforsecurity=False)
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _remedy(name: str, force: bool = False, pieces: bool = False) -> str:
    if pieces:
        return f"`python data/prepare_pieces.py {name} --tokenizer T --data_files FILE{' --force' if force else ''}`"
    source = "" if name in BUILT_IN else " --source FILE"
    return f"`python data/prepare.py {name or 'NAME'}{source}{' --force' if force else ''}`"


def _meta_fault(meta: Any) -> str | None:
    """What keeps `meta` from being a meta.json of this version, in words; None when nothing does."""
    if not isinstance(meta, dict):
        return "is not a JSON object"
    if meta.get("schema") != SCHEMA:
        return f"has schema {meta.get('schema')!r}, this program reads schema {SCHEMA}"
    for key in ("name", "title", "source"):
        if not isinstance(meta.get(key), str):
            return f"lacks the text {key!r}"
    if not isinstance(meta.get("official_text"), bool):
        return "lacks the true or false 'official_text'"
    if "vocabulary" in meta and Vocabulary.from_meta(meta["vocabulary"]) is None:
        return "has a 'vocabulary' without name, size, sha256 and ids of this version"
    splits = meta.get("splits")
    for split in SPLITS:
        entry = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            return f"lacks the bytes and sha256 of {split!r}"
    return None


def _read_meta(folder: Path, pieces: bool) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a prepared text, it has no {META}: prepare one with {_remedy(folder.name, pieces=pieces)}"
        ) from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UserError(f"{path} is not readable as JSON ({error}): prepare it again with {_remedy(folder.name, True, pieces)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if fault := _meta_fault(meta):
        raise UserError(f"{path} {fault}: prepare it again with {_remedy(folder.name, True, pieces)}")
    return meta


def _open_split(folder: Path, split: str, meta: dict[str, Any]) -> np.memmap:
    path, expected = split_file(folder, split), meta["splits"][split]["bytes"]
    found = path.stat().st_size if path.is_file() else None
    if found != expected or not found or ("vocabulary" in meta and found % 2):
        there = "is missing" if found is None else f"has {found:,} bytes"
        pieces = "vocabulary" in meta
        wanted = f"{META} says {expected:,} bytes" + (", two each piece" if pieces else "")
        raise UserError(f"{path} {there}, {wanted}: prepare it again with {_remedy(meta['name'], True, pieces)}")
    try:
        return np.memmap(path, dtype=np.uint16 if "vocabulary" in meta else np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Corpus:
    """A folder written by data/prepare.py or data/prepare_pieces.py. `train`, `valid`, `test`: read-only arrays on disk, uint8 [bytes], or
    uint16 [pieces] where there is a vocabulary.
    """

    path: Path
    meta: dict[str, Any]
    train: np.memmap
    valid: np.memmap
    test: np.memmap

    @classmethod
    def open(cls, path: str | Path, pieces: bool = False) -> Corpus:
        """Opens the folder `path` after checking meta.json and the size of each split; reads none of the text. `pieces`: what it should
        hold, for the remedy.

        Raises UserError, with the remedy, where a file is missing, unknown or of another size than meta.json says.
        """
        folder = Path(path)
        meta = _read_meta(folder, pieces)
        return cls(folder, meta, *(_open_split(folder, split, meta) for split in SPLITS))

    @property
    def name(self) -> str:
        """The name it was prepared under, e.g. "enwik8"."""
        return self.meta["name"]

    @property
    def title(self) -> str:
        """The name for people, used in tables."""
        return self.meta["title"]

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Of word pieces; None for bytes."""
        return Vocabulary.from_meta(self.meta["vocabulary"]) if "vocabulary" in self.meta else None

    @property
    def unit(self) -> str:
        """What its arrays count."""
        return "pieces" if "vocabulary" in self.meta else "bytes"

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, over the recorded hashes of the three splits: the same bytes, the same fingerprint."""
        return hashlib.sha256("".join(self.meta["splits"][split]["sha256"] for split in SPLITS).encode()).hexdigest()

    def verify(self) -> None:
        """Reads every byte. Raises UserError where a split's sha256 is not the recorded one."""
        for split in SPLITS:
            path, expected = split_file(self.path, split), self.meta["splits"][split]["sha256"]
            _, found = digest_of(read_chunks(path), "sha256")
            if found != expected:
                remedy = _remedy(self.name, True, self.vocabulary is not None)
                raise UserError(f"{path} has sha256 {found}, {META} says {expected}: prepare it again with {remedy}")
