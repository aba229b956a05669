"""How many experts a layer activates in a pass: one k, a k for each row or token, or as many as reach a gate mass.

What `top_k` and `top_p` select holds in the calling thread or asyncio task only, so that requests that run at the same time do not disturb
each other. What `set_top_k` sets, a layer's `default_k`, holds where nothing else is selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from smoe_dropout.options import ConfigError

if TYPE_CHECKING:
    from smoe_dropout.layer import MoELayer


class TokenK(NamedTuple):
    """A k for each row, [B], or each token, [B, T], of a batch; int64 on any device. largest: of them."""

    values: Tensor
    largest: int

    def of_tokens(self, x: Tensor, sequence_first: bool) -> Tensor:
        """The k of every token of a layer's input [..., D] [N], on its device.

        sequence_first: whether the input is [T, B, D]. ConfigError if the input has other rows or tokens.
        """
        lead, k = x.shape[:-1], self.values.to(x.device)
        rows, count = len(k), lead.numel()
        if k.dim() == 2 and (lead == (k.t() if sequence_first else k).shape or (len(lead) == 1 and count == k.numel())):
            return (k.t() if sequence_first and len(lead) > 1 else k).reshape(-1)
        if k.dim() == 1 and len(lead) == 1 and rows and count % rows == 0:  # tokens without a row of their own, row after row
            return k.repeat_interleave(count // rows)
        if k.dim() == 1 and len(lead) > 1 and lead[int(sequence_first)] == rows:
            shape = (1, rows) if sequence_first else (rows, 1)
            return k.view(*shape, *[1] * (len(lead) - 2)).expand(lead).reshape(-1)
        raise ConfigError(
            f"k is a tensor {list(k.shape)} for {'the rows [B]' if k.dim() == 1 else 'the tokens [B, T]'} of a batch, but an MoE layer got "
            f"an input {list(x.shape)}: give one k for each of its rows, or for each of its tokens"
        )


class GateMass(NamedTuple):
    """As many experts as it takes to reach the fraction p of the router's probability, at least `smallest` and at most `largest`."""

    p: float
    smallest: int
    largest: int


Selection = int | TokenK | GateMass

_CHOSEN: ContextVar[Mapping[MoELayer, Selection]] = ContextVar("chosen")


class _Context:
    """Reads the context variable as an attribute.

    torch.compile cannot trace a context variable, but it guards attributes that are implemented in C, so that a compiled model follows the
    context, too. Where nothing is selected, `get` is called with this object as the default and returns it.
    """

    chosen = property(_CHOSEN.get)


_CONTEXT = _Context()


def selected(layer: MoELayer) -> Selection:
    """What the layer activates in this thread or task."""
    chosen = _CONTEXT.chosen
    return layer.default_k if chosen is _CONTEXT else chosen.get(layer, layer.default_k)


@contextmanager
def selecting(choices: Mapping[MoELayer, Selection]) -> Iterator[None]:
    """Context manager in which these layers activate what they are given."""
    token = _CHOSEN.set({**_CHOSEN.get({}), **choices})
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def largest(selection: Selection) -> int:
    """Most experts that a token can have."""
    return selection if isinstance(selection, int) else selection.largest
