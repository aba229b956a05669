"""The ordered lanes of Transformer-XL over a text, and their split over processes. Imports torch only when a segment is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:
    import torch


class Segment(NamedTuple):
    """One step of every lane. `targets` are `tokens` shifted by one byte."""

    tokens: torch.Tensor  # int64 [lanes, L]
    targets: torch.Tensor  # int64 [lanes, L]
    first: bool  # the first segment of an epoch: the model must drop its memory of earlier segments


class LaneIterator:
    """The ordered lanes of Transformer-XL: lane b reads bytes b*n_step to (b+1)*n_step in order, tgt_len at a time.

    n_step = len(data) // batch_size; the last len(data) % batch_size bytes are never read. The segment at position i has
    L = min(tgt_len, n_step - 1 - i) tokens per lane, so only the last one of an epoch may be shorter.
    The iterator is endless and counts epochs; `one_pass` is for evaluation.
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
        """`data`: uint8 [bytes]. `batch_size`: lanes of all ranks together. `lanes`: those of this rank, default all; an empty range, as
        in evaluation, yields tensors [0, L]. `fingerprint`: of the corpus, saved with the state so that another text is refused.

        Raises UserError where a size is not positive or `data` is too short for `batch_size` lanes of 2 bytes.
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
            raise ValueError(f"lanes must be a range of step 1 within 0..{batch_size}, not {lanes}")
        self.batch_size, self.tgt_len, self.lanes, self.device = batch_size, tgt_len, lanes, device
        self.fingerprint = fingerprint
        self.epoch = 0  # completed epochs
        self.position = 0  # where in its lane the next segment starts
        self._length = len(data)
        self._lanes = data[: self.n_step * batch_size].reshape(batch_size, self.n_step)[lanes.start : lanes.stop]

    @property
    def segments_per_epoch(self) -> int:
        """Segments in one pass over the data, the same on every rank."""
        return -(-(self.n_step - 1) // self.tgt_len)

    def _segment(self, position: int) -> Segment:
        import torch  # not at the top: see the module's docstring

        length = min(self.tgt_len, self.n_step - 1 - position)

        def tensor(start: int) -> torch.Tensor:
            # one int64 copy of the slice, shared with torch; contiguous, so that callers may .view it
            return torch.from_numpy(self._lanes[:, start : start + length].astype(np.int64, order="C")).to(self.device)

        return Segment(tensor(position), tensor(position + 1), position == 0)

    def __iter__(self) -> LaneIterator:
        return self

    def __next__(self) -> Segment:
        """Return the next segment; after the last one of an epoch, the first one of the next epoch. Never ends."""
        segment = self._segment(self.position)
        self.position += self.tgt_len
        if self.position >= self.n_step - 1:
            self.epoch, self.position = self.epoch + 1, 0
        return segment

    def one_pass(self) -> Iterator[Segment]:
        """Yield every segment once, from the start of the data, without changing `epoch` and `position`."""
        for position in range(0, self.n_step - 1, self.tgt_len):
            yield self._segment(position)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data. It is the same on every rank and can be loaded with another number of ranks."""
        return {"epoch": self.epoch, "position": self.position, **self._shape()}

    def _shape(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "tgt_len": self.tgt_len, "data_bytes": self._length, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved. Raises UserError for the state of another text, batch size or segment length."""
        names = {"batch_size": "--batch_size {}", "tgt_len": "--tgt_len {}", "data_bytes": "{} bytes of text", "fingerprint": "the text {}"}
        for key, here in self._shape().items():
            saved = state.get(key)
            if key == "fingerprint" and (saved is None or here is None):
                continue  # one side was made without a Corpus; the lengths have been compared
            if saved != here:
                fault = f"the checkpoint was saved with {names[key].format(saved)}, this run has {here}"
                raise UserError(f"{fault}: resume with the same settings and data")
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int or epoch < 0 or position not in range(0, self.n_step - 1, self.tgt_len):
            fault = f"epoch {epoch!r} and position {position!r} are outside the data"
            raise UserError(f"the checkpoint's state of the data is damaged, {fault}: resume from another checkpoint")
        self.epoch, self.position = epoch, position


def rank_lanes(batch_size: int, rank: int, world_size: int, training: bool = True) -> range:
    """Return the lanes of `rank`: contiguous, of sizes that differ by at most one, covering 0..batch_size over all ranks.

    Raises UserError when training with fewer lanes than ranks; in evaluation the surplus ranks get an empty range.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not within 0..{world_size}")
    if training and batch_size < world_size:
        raise UserError(f"--batch_size {batch_size} is less than the {world_size} processes: use --batch_size {world_size} or more")
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
