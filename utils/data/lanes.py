"""The ordered lanes of Transformer-XL over a text, and their split over processes. Imports torch only when a segment is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:
    import torch


class Lanes:
    """The segments of a text, in order: lane b reads symbols b*n_step to (b+1)*n_step, tgt_len at a time.

    n_step = len(data) // batch_size; the last len(data) % batch_size are never read. The segment at position i has
    L = min(tgt_len, n_step - 1 - i) tokens per lane, so only the last one may be shorter.
    """

    def __init__(
        self,
        data: np.ndarray,
        batch_size: int,
        tgt_len: int,
        device: str | torch.device = "cpu",
        lanes: range | None = None,
        option: str = "--batch_size",
        read: np.ndarray | None = None,
    ) -> None:
        """`data`: symbols, integers [N]. `batch_size`: lanes of all ranks together. `lanes`: those of this rank, default all; none of them,
        as in evaluation, gives tensors [0, L]. Raises UserError where `data` is too short for `batch_size` lanes of 2 symbols.
        `read`: the tokens, where they are not those of `data`, whose targets they have.
        """
        n_step, lanes = len(data) // batch_size, range(batch_size) if lanes is None else lanes
        if n_step < 2:
            remedy = f"use {option} {len(data) // 2} or smaller" if len(data) >= 2 else "use a longer text"
            raise UserError(f"a split of {len(data):,} symbols is too short for {option} {batch_size} lanes of 2 symbols or more: {remedy}")
        both = (whole[: n_step * batch_size].reshape(batch_size, n_step) for whole in (data if read is None else read, data))
        self._read, self._lanes = (whole[lanes.start : lanes.stop] for whole in both)
        self._device = device
        self._starts = range(0, n_step - 1, tgt_len)

    def __len__(self) -> int:
        """Segments in one pass over the text, the same on every rank."""
        return len(self._starts)

    def at(self, step: int) -> int:
        """The segment of a training step, which reads pass after pass."""
        return step % len(self)

    def _range(self, index: int) -> tuple[int, int]:
        """The first position of a segment, and the one after its last."""
        start = self._starts[index]
        return start, min(start + self._starts.step, self._lanes.shape[1] - 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of a segment, int64 [lanes, L]; the targets are the tokens shifted by one."""
        import torch  # not at the top: see the module's docstring

        start, stop = self._range(index)

        def tensor(lanes: np.ndarray, offset: int) -> torch.Tensor:  # a contiguous int64 copy, shared with torch
            return torch.from_numpy(lanes[:, start + offset : stop + offset].astype(np.int64, order="C")).to(self._device)

        return tensor(self._read, 0), tensor(self._lanes, 1)


class VariedLanes(Lanes):
    """Lanes in segments of random length, drawn as in the official code: N(tgt_len, 5²), for one of 20 N(tgt_len / 2, 5²), rounded towards
    zero, from 5 to tgt_len + 15; the last one ends with the text. The seed and the number of the pass determine them.
    """

    SHORTEST, DEVIATION, LENGTHS = 5, 5, 3  # the last: key of the random stream

    def __init__(self, data: np.ndarray, batch_size: int, tgt_len: int, *others: Any, seed: int):
        super().__init__(data, batch_size, tgt_len, *others)
        self._seed, self._pass, self._before = seed, 0, 0  # the current pass, and the segments of those before it
        self._bounds = self._drawn()

    def __len__(self) -> int:
        """Segments in the current pass."""
        return len(self._bounds) - 1

    def at(self, step: int) -> int:
        """The segment of a training step in its pass, which is the current one from now on."""
        if step < self._before:
            self._pass, self._before = 0, 0
            self._bounds = self._drawn()
        while step >= self._before + len(self):
            self._pass, self._before = self._pass + 1, self._before + len(self)
            self._bounds = self._drawn()
        return step - self._before

    def _range(self, index: int) -> tuple[int, int]:
        return self._bounds[index], self._bounds[index + 1]

    def _drawn(self) -> np.ndarray:
        """Positions at which the segments of a pass begin, and its end."""
        end, tgt_len = self._lanes.shape[1] - 1, self._starts.step
        draw, most = np.random.default_rng((self._seed, self._pass, self.LENGTHS)), end // self.SHORTEST + 1
        mean = np.where(draw.random(most) < 0.95, tgt_len, tgt_len / 2)
        length = draw.normal(mean, self.DEVIATION).astype(np.int64).clip(self.SHORTEST, tgt_len + 3 * self.DEVIATION)
        bounds = np.concatenate(([0], length.cumsum()))
        return np.append(bounds[bounds < end], end)


def rank_lanes(batch_size: int, rank: int, world_size: int, training: bool = True) -> range:
    """Return the lanes of `rank`: contiguous, of sizes that differ by at most one, covering 0..batch_size over all ranks.

    Raises UserError when training with fewer lanes than ranks; in evaluation the surplus ranks get an empty range.
    """
    if training and batch_size < world_size:
        raise UserError(f"--batch_size {batch_size} is less than the {world_size} processes: use --batch_size {world_size} or more")
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
