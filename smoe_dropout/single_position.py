"""Generation: the cache of positions already read, and linear maps and attention of a single position without matrix products.

A CPU's matrix-vector product reads a matrix at a third of the memory bandwidth. Dot products with rows and sums over rows, as in an
embedding bag and its derivative, read them at two thirds. Imports torch alone. B sequences, H heads of width C, K keys, L distances.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ELEMENTWISE = 2  # sequences up to which a CPU forms attention faster by elementwise products than by matrix products


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. On a CPU a single position takes a dot product with each row of the weight, which reads it once, at twice the speed."""
    alone = x.shape[-1:] == weight.shape[1:] == (x.numel(),)
    known = weight.dtype == torch.float32 and weight.layout == torch.strided and type(weight) in (Tensor, nn.Parameter)
    if not (alone and known and is_plain(x)):
        return F.linear(x, weight, bias)
    y = dots(x.view(1, -1), weight, *numbered(len(weight)))
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def dots(x_ND: Tensor, rows_RD: Tensor, row_M: Tensor, token_M: Tensor) -> Tensor:
    """Dot product of a row and a token [M], each given by its number: the derivative of an embedding bag by its weights per sample."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x_ND, rows_RD, row_M, row_M[:0], token_M, 0)


@functools.lru_cache(maxsize=256)
def numbered(count: int) -> tuple[Tensor, Tensor]:
    """The numbers 0, 1, ... of this many rows, and as many zeros. They must not be changed."""
    rows = torch.arange(count, device="cpu")  # whatever the default device is now
    return rows, torch.zeros_like(rows)


def sums(rows_RD: Tensor, row_M: Tensor, begin_N: Tensor, weights_M: Tensor) -> Tensor:
    """Weighted sums of rows [N, D], one from each of the places where one begins: an embedding bag."""
    return torch.embedding_bag(rows_RD, row_M, begin_N, False, 0, False, weights_M)[0]


def mapped(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), by `product` if it is nothing but an nn.Linear."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return linear(x)
    return product(x, linear.weight, linear.bias)


def is_plain(x: Tensor) -> bool:
    """Return whether x is on a CPU, in float32, and nothing is differentiated, transformed, traced or cast."""
    if type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.float32:
        return False
    return x.is_cpu and not torch.is_autocast_enabled("cpu") and torch._C._functorch.peek_interpreter_stack() is None


def attend(qu_HBTC: Tensor, qv_HBTC: Tensor, k_HBKC: Tensor, v_HBKC: Tensor, r_HKC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention probabilities [H, B, 1, K] of one position, which nothing is hidden from, and its output [H, B, 1, C]."""
    terms_HBKC = (k_HBKC * qu_HBTC).addcmul_(r_HKC[:, None], qv_HBTC)
    p_HBTK = terms_HBKC.sum(-1).softmax(-1)[:, :, None]
    return p_HBTK, (v_HBKC * p_HBTK.transpose(2, 3)).sum(2, keepdim=True)


class OfThread(threading.local):
    """Value that every thread sets for itself."""

    value: Any = None

    @contextmanager
    def holding(self, value: Any) -> Iterator[None]:
        """Set the value while this runs, and None afterwards."""
        self.value = value
        try:
            yield
        finally:
            self.value = None

    def __reduce__(self):  # copies and pickles have none
        return OfThread, ()


class KeyValueCache:
    """Keys and values of an attention module for positions already read, and the keys of distances, without gradients.

    Buffers are twice as long as needed, so that their content moves only when they are full, not for every new position. They keep SPARE
    positions beyond the memory, which is still complete after that many have been forgotten. count: positions read and not forgotten.
    carried: values [B, P, C] of the last P of them for layers that mix positions, by the layer's place; see `carry`.
    """

    SPARE = 32

    def __init__(self):
        self.r_HLC: Tensor | None = None  # keys of the distances L - 1 .. 0
        self._kv: Tensor | None = None  # [2, H, B, capacity, C], filled up to `_end`
        self.count, self.carried = 0, dict[int, tuple[Tensor, ...]]()
        self._end, self._needed = 0, 0  # of the filled positions, those that the memory needs because earlier ones are gone

    @property
    def length(self) -> int:
        """Number of positions cached."""
        return self._end

    def extend(self, k_HBTC: Tensor, v_HBTC: Tensor, memory: int) -> Tensor:
        """Append new positions; return keys and values [2, H, B, M + T, C] of them and of at most `memory` positions before."""
        T = k_HBTC.shape[2]
        if self._kv is None or self._end + T > self._kv.shape[3]:
            H, B, _, C = k_HBTC.shape
            fresh, kept = k_HBTC.new_empty(2, H, B, 2 * (memory + T) + self.SPARE, C), min(self._end, memory + self.SPARE)
            if kept:
                fresh[:, :, :, :kept] = self._kv[:, :, :, self._end - kept : self._end]
            self._needed = memory if kept < self._end else self._needed
            self._kv, self._end = fresh, kept
        begin, new = self._end - min(self._end, memory), self._kv[:, :, :, self._end : self._end + T]
        new[0].copy_(k_HBTC), new[1].copy_(v_HBTC)
        self._end, self.count = self._end + T, self.count + T
        return self._kv[:, :, :, begin : self._end]

    def carry(self, place: int, *parts_BTC: Tensor) -> tuple[Tensor, ...]:
        """Parts of a pass's positions with those of the positions carried before them [B, P + T, C], which are carried from now on."""
        if place in self.carried:
            parts_BTC = tuple(torch.cat(pair, 1) for pair in zip(self.carried[place], parts_BTC, strict=True))
        self.carried[place] = parts_BTC
        return parts_BTC

    def forget(self, count: int) -> None:
        """Forget the last `count` positions, as if they had never been read.

        ValueError for more than SPARE, at once or one after another, if the memory would not be complete, or for more than there are,
        also of those that are carried.
        """
        carried = min((parts[0].shape[1] for parts in self.carried.values()), default=self._end)
        if not 0 <= count <= min(self.SPARE, self._end - self._needed, carried):
            raise ValueError(
                f"{count} of {self._end} positions cannot be forgotten: at most {self.SPARE} can, and the memory must be complete"
            )
        self._end, self.count = self._end - count, self.count - count
        self.carried = {place: tuple(part[:, : part.shape[1] - count] for part in parts) for place, parts in self.carried.items()}
