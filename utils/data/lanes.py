"""The ordered lanes of Transformer-XL over a text, and how rows are shared between processes. Imports torch only when a segment is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:
    import torch


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
