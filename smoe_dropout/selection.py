"""Number of experts that a layer activates in a pass: one k, a k for each row or token, or as many as reach a gate mass.

What `top_k` and `top_p` select holds in the calling thread or asyncio task only, so that requests that run at the same time do not disturb
each other. What `set_top_k` sets, a layer's `default_k`, holds where nothing else is selected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor, nn

from smoe_dropout.options import ConfigError


class TokenK(NamedTuple):
    """A k for each row, [B], or each token, [B, T], of a batch; int64 on any device. largest: of them."""

    values: Tensor
    largest: int

    def of_tokens(self, x: Tensor, sequence_first: bool, batch: Tensor | None) -> Tensor:
        """The k of every token of a layer's input [..., D] [N], on its device.

        sequence_first: whether the input is [T, B, D]. batch: the model's own input [B, T, ...], which tells rows where the model has
        flattened its tokens to [B * T, D]; None if it is unknown. ConfigError if the input has other rows or tokens.
        """
        lead, k, kind = x.shape[:-1], self.values.to(x.device), "the rows [B]" if self.values.dim() == 1 else "the tokens [B, T]"
        if len(lead) == 1 and batch is not None and batch.shape[:2].numel() == len(x):
            lead, sequence_first = batch.shape[:2], False
        if k.dim() == 2 and sequence_first:
            k = k.t()
        if k.dim() == 2 and (lead == k.shape or (batch is None and lead == (k.numel(),))):
            return k.reshape(-1)
        place = int(sequence_first and len(lead) > 1)
        if k.dim() == 1 and lead and lead[place] == len(k):
            return k.view(-1, *[1] * (len(lead) - place - 1)).expand(lead).reshape(-1)
        remedy = "give one k for each of its rows, or for each of its tokens"
        if k.dim() == 1 and len(lead) > 1 and lead[place] % len(k) == 0:
            remedy += f"; generate() repeats rows for beams and num_return_sequences: k.repeat_interleave({lead[place] // len(k)})"
        raise ConfigError(
            f"k is a tensor {list(self.values.shape)} for {kind} of a batch, but an MoE layer got an input {list(x.shape)}: {remedy}"
        )


class GateMass(NamedTuple):
    """As many experts as it takes to reach the fraction p of the router's probability, at least `smallest` and at most `largest`."""

    p: float
    smallest: int
    largest: int


Selection = int | TokenK | GateMass

Blocks = tuple[dict[nn.Module, Any], ...]

# values by layer of the open blocks of `top_k` and `top_p`, and of `token_mask`, the innermost last
CHOSEN: ContextVar[Blocks] = ContextVar("chosen")
MASKED: ContextVar[Blocks] = ContextVar("masked")


class _Context:
    """Reads the context variables as attributes.

    torch.compile cannot trace a context variable, but it guards attributes that are implemented in C, so that a compiled model follows the
    context, too. Where no block is open, `get` is called with this object as the default and returns it.
    """

    chosen, masked = property(CHOSEN.get), property(MASKED.get)


_CONTEXT = _Context()


def selected(layer: nn.Module) -> Selection:
    """Number of experts that an MoE layer activates in this thread or task."""
    return _innermost(_CONTEXT.chosen, layer, layer.default_k)


def masked(layer: nn.Module) -> Tensor | None:
    """The mask of real tokens that `token_mask` gives the layer in this thread or task."""
    return _innermost(_CONTEXT.masked, layer, None)


def overridden(layer: nn.Module) -> bool:
    """Return whether a block of `top_k` or `top_p` around this call chooses the layer's k."""
    return _innermost(_CONTEXT.chosen, layer, None) is not None


def _innermost(blocks: Blocks | _Context, layer: nn.Module, default: Any) -> Any:
    if blocks is not _CONTEXT:
        for block in reversed(blocks):
            if (value := block.get(layer)) is not None:
                return value
    return default


@contextmanager
def bound(variable: ContextVar[Blocks], values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Context manager in which `CHOSEN` or `MASKED` has these values for these layers, in this thread or task.

    ConfigError on leaving it in another thread or task, or before a block that was entered later, as generators that take turns do.
    """
    own = dict(values)
    token = variable.set((*_opened(variable), own))
    try:
        yield
    finally:
        opened = _opened(variable)
        in_place = bool(opened) and opened[-1] is own
        try:
            variable.reset(token)
        except ValueError:  # entered in another context, where nothing else would end it
            own.clear()
            in_place = False
        variable.set(tuple(block for block in opened if block is not own) or _CONTEXT)
    if not in_place:
        raise ConfigError(
            "a block of top_k, top_p or token_mask was left in another thread or task than it was entered in, or before a block that was "
            "entered later, so passes inside it may have had another k: in a generator, open a block for each pass, between two yields"
        )


class Block:
    """Context manager, to be entered once, and decorator that opens a new block for each call of a function, also of one with `async`."""

    def __init__(self, make: Callable[[], AbstractContextManager[nn.Module]]):
        self.make: Callable[[], AbstractContextManager[nn.Module]] = make
        self.own: AbstractContextManager[nn.Module] | None = None

    def __enter__(self) -> nn.Module:
        """Open the block. ConfigError if it was opened before."""
        if self.own is not None:
            raise ConfigError("this block of top_k, top_p or token_mask was opened before: call the function again for each `with`")
        self.own = self.make()
        return self.own.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.own.__exit__(*error)

    def __call__(self, function: Callable) -> Callable:
        """The function inside a block. ConfigError for a generator function, whose body runs after the call and takes turns with others."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise _of_generator(function)
        if inspect.iscoroutinefunction(function):

            async def inside(*args: Any, **named: Any) -> Any:
                with self.make():
                    return await function(*args, **named)
        else:

            def inside(*args: Any, **named: Any) -> Any:
                with self.make():
                    result = function(*args, **named)
                if inspect.isgenerator(result) or inspect.isasyncgen(result):
                    raise _of_generator(function)
                return self._awaited(result) if inspect.iscoroutine(result) else result

        return wraps(function)(inside)

    async def _awaited(self, result: Coroutine) -> Any:
        with self.make():
            return await result


def _of_generator(function: Callable) -> ConfigError:
    return ConfigError(
        f"top_k, top_p and token_mask cannot decorate {getattr(function, '__name__', function)!r}, a generator function: "
        "inside it, open a block for each pass, between two yields"
    )


P = ParamSpec("P")


def block(function: Callable[P, Iterator[nn.Module]]) -> Callable[P, Block]:
    """Decorator like `contextmanager`, for functions that open a `Block`."""
    manager = contextmanager(function)

    @wraps(function)
    def make(*args: P.args, **named: P.kwargs) -> Block:
        return Block(partial(manager, *args, **named))

    return make


def _opened(variable: ContextVar[Blocks]) -> Blocks:
    blocks = variable.get(())
    return () if blocks is _CONTEXT else blocks


def largest(selection: Selection) -> int:
    """Most experts that a token can have."""
    return selection if isinstance(selection, int) else selection.largest
