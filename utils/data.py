"""Prepared texts (`Corpus`) and the ordered lanes of Transformer-XL over them (`LaneIterator`).

Importing this module does not import torch: `Corpus.open` is a cheap check of the data before anything slow starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

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


class Segment(NamedTuple):
    """One step of every lane: `targets` are `tokens` moved on by one byte."""

    tokens: torch.Tensor  # int64 [lanes, L]
    targets: torch.Tensor  # int64 [lanes, L]
    first: bool  # the first segment of an epoch: what the model remembers of earlier segments must be dropped


class LaneIterator:
    """The ordered lanes of Transformer-XL: lane b reads bytes b*n_step to (b+1)*n_step in order, tgt_len at a time.

    n_step = len(data) // batch_size, so the last len(data) % batch_size bytes are never read. The segment at position i
    has L = min(tgt_len, n_step - 1 - i) tokens per lane, hence only the last of an epoch may be shorter.
    As an iterator it is endless and counts epochs; `one_pass` is for evaluation.
    """

    def __init__(
        self,
        data: np.ndarray,
        batch_size: int,
        tgt_len: int,
        device: str | torch.device = "cpu",
        lanes: range | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """`data`: uint8 [bytes]. `batch_size`: lanes of all ranks together. `lanes`: those of this rank (default all; may be
        empty in evaluation, which yields tensors [0, L]). `fingerprint`: of the corpus, kept in the state to refuse another text.

        Raises UserError where `data` is too short for `batch_size` lanes of 2 bytes or a size is not positive.
        """
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(f"data must be uint8 [bytes], not {data.dtype} {list(data.shape)}")
        if batch_size < 1 or tgt_len < 1:
            raise UserError(f"--batch_size {batch_size} and --tgt_len {tgt_len} must both be at least 1")
        self.n_step = len(data) // batch_size
        if self.n_step < 2:
            remedy = f"use --batch_size {len(data) // 2} or smaller" if len(data) >= 2 else "use a longer text"
            raise UserError(f"a split of {len(data):,} bytes is too short for --batch_size {batch_size} lanes of 2 bytes or more: {remedy}")
        lanes = range(batch_size) if lanes is None else lanes
        if lanes.step != 1 or lanes.start < 0 or lanes.stop > batch_size:
            raise ValueError(f"lanes must be a plain range within 0..{batch_size}, not {lanes}")
        self.batch_size, self.tgt_len, self.lanes, self.device = batch_size, tgt_len, lanes, device
        self.fingerprint = fingerprint
        self.epoch = 0  # epochs finished
        self.position = 0  # where in its lane the next segment starts
        self._length = len(data)
        self._lanes = data[: self.n_step * batch_size].reshape(batch_size, self.n_step)[lanes.start : lanes.stop]

    @property
    def segments_per_epoch(self) -> int:
        """Segments in one pass over the data; the same on every rank."""
        return -(-(self.n_step - 1) // self.tgt_len)

    def _segment(self, position: int) -> Segment:
        import torch  # only here: see the module's docstring

        length = min(self.tgt_len, self.n_step - 1 - position)

        def tensor(start: int) -> torch.Tensor:
            # one int64 copy of this slice, which torch then shares; contiguous, so that callers may .view it
            return torch.from_numpy(self._lanes[:, start : start + length].astype(np.int64, order="C")).to(self.device)

        return Segment(tensor(position), tensor(position + 1), position == 0)

    def __iter__(self) -> LaneIterator:
        return self

    def __next__(self) -> Segment:
        """The next segment; after the last of an epoch the first of the next one. Never ends."""
        segment = self._segment(self.position)
        self.position += self.tgt_len
        if self.position >= self.n_step - 1:
            self.epoch, self.position = self.epoch + 1, 0
        return segment

    def one_pass(self) -> Iterator[Segment]:
        """Every segment once, from the start of the data; leaves `epoch` and `position` alone."""
        for position in range(0, self.n_step - 1, self.tgt_len):
            yield self._segment(position)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator is. Holds nothing of the rank: it may be loaded with another number of ranks."""
        return {"epoch": self.epoch, "position": self.position, **self._shape()}

    def _shape(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "tgt_len": self.tgt_len, "data_bytes": self._length, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was saved. Raises UserError for the state of another text, batch size or segment length."""
        names = {"batch_size": "--batch_size", "tgt_len": "--tgt_len", "data_bytes": "a split of that many bytes", "fingerprint": "a text"}
        for key, here in self._shape().items():
            saved = state.get(key)
            if key == "fingerprint" and (saved is None or here is None):
                continue  # either side was made without a Corpus; the length was compared
            if saved != here:
                raise UserError(f"the saved state is of {names[key]} {saved}, this run has {here}: resume with the same settings and data")
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int or epoch < 0 or position not in range(0, self.n_step - 1, self.tgt_len):
            raise UserError(f"the saved state's epoch {epoch!r} and position {position!r} are not a place in this data: it is damaged")
        self.epoch, self.position = epoch, position


def rank_lanes(batch_size: int, rank: int, world_size: int, training: bool = True) -> range:
    """The lanes of `rank`: contiguous, sizes differ by one at most, all ranks together cover 0..batch_size.

    Raises UserError when training with fewer lanes than ranks; in evaluation the ranks left over get an empty range.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not within 0..{world_size}")
    if training and batch_size < world_size:
        raise UserError(f"--batch_size {batch_size} is less than the {world_size} processes: use --batch_size {world_size} or more")
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
