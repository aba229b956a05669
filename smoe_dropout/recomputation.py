"""Support for activation checkpointing, which repeats a layer's forward pass during the backward pass.

torch repeats the code and the random numbers. It does not know what a layer reads besides its input: k, padding, token ids, buffers. So
every pass that may be repeated is recorded, and its repetition reads what the original pass read. Where the original cannot be told from
other passes, gradients could be silently wrong, and the repetition is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smoe_dropout.selection import Selection, TokenK

KEPT = 4  # passes that are recorded, such as those of an objective that runs the model several times before it calls backward()
LOST = 64  # further passes that are remembered, without buffers, if they were not repeated
REMEDY = "call backward() right after the pass it belongs to, or train without gradient checkpointing"


class Pass(NamedTuple):
    """Record of a layer's pass.

    selection: its k. sample: of its input. hooked: whether hooks packed the tensors that autograd saved. losses_in_graph: whether its
    losses are in a graph; None without losses. real_N: its real tokens. tokens: its token ids. repeated: filled when it has been repeated.
    buffers: by name, those that the pass changed, as they were before it.
    """

    selection: Selection
    sample: Tensor
    hooked: bool
    losses_in_graph: bool | None
    real_N: Tensor | None
    tokens: Tensor | None
    repeated: list[bool]
    buffers: Mapping[str, Tensor] = {}


def recomputing() -> bool:
    """Return whether this is a repeated pass, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_repeated(training: bool) -> bool:
    """Return whether hooks pack saved tensors, or this is a pass without gradients in training."""
    return hooked() or (training and not torch.is_grad_enabled())


def record_pass(x: Tensor, selection: Selection, losses: dict[str, Tensor], real_N: Tensor | None, tokens: Tensor | None) -> Pass:
    """Record of this pass."""
    return Pass(selection, sampled(x), hooked(), in_graph(losses), real_N, tokens, [])


def hooked() -> bool:
    """Return whether hooks pack the tensors that autograd saves, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's buffers by name, if the pass that begins may be repeated; else none."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()} if may_be_repeated(module.training) else {}


@contextmanager
def with_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager that gives a module copies of these buffers, and its own back on exit, whatever was done to the copies."""
    own = []
    for name, buffer in buffers.items():
        holder, _, leaf = name.rpartition(".")
        table = module.get_submodule(holder)._buffers
        own.append((table, leaf, table[leaf]))
        table[leaf] = buffer.clone()
    try:
        yield
    finally:
        for table, leaf, buffer in own:
            table[leaf] = buffer


def sampled(x: Tensor) -> Tensor:
    """About 64 values of the input, enough to distinguish passes."""
    flat = x.detach().flatten()
    return flat[:: max(flat.numel() // 64, 1)].clone()


def identical(one: Tensor, other: Tensor) -> bool:
    """Return whether shapes and values are equal, counting NaN as equal to NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def similar(one: Tensor, other: Tensor) -> bool:
    """Return whether shapes are equal, and values up to rounding: torch multiplies matrices differently with gradients than without."""
    tolerance = max(1e-5, 8 * torch.finfo(one.dtype).eps)
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance * one.abs().mean().item())


def in_graph(losses: dict[str, Tensor]) -> bool | None:
    """Return whether any loss requires a gradient; None without losses."""
    return any(loss.requires_grad for loss in losses.values()) if losses else None


def with_record(records: list[list[Pass]], recorded: Pass, again: bool, lost: list[Pass]) -> tuple[list[list[Pass]], list[Pass]]:
    """Records of the last passes with a new one, and those that were dropped before they were repeated.

    again: whether the layer has run before in the same pass of the model.
    """
    passes = records if again and records else [*records[1 - KEPT :], []]
    dropped = (one._replace(buffers={}) for its in records[: len(records) + 1 - len(passes)] for one in its if not one.repeated)
    return [*passes[:-1], [*passes[-1], recorded]], [*lost, *dropped][-LOST:]


def original(records: Sequence[Sequence[Pass]], lost: Sequence[Pass], x: Tensor) -> Pass:
    """The record of the pass that is being repeated: the one with this input.

    lost: passes that were dropped from them. Raises RuntimeError if there is none, if several that have not been repeated yet differ in
    what else they read, or if it may be one of the lost passes.
    """
    sample, by_hooks = sampled(x), hooked()
    known = [one for passes in records for one in passes if one.hooked == by_hooks]
    found = [one for one in known if identical(one.sample, sample)] or [one for one in known if similar(one.sample, sample)]
    if not found:
        raise RuntimeError(f"another pass of the model ran between a checkpointed pass and its backward pass: {REMEDY}")
    waiting = [one for one in found if not one.repeated]
    if not waiting and any(similar(one.sample, sample) and not same(one, found[-1]) for one in lost):
        raise RuntimeError(f"more than {KEPT} checkpointed passes with the same input wait for their backward pass: {REMEDY}")
    found = waiting or found[-1:]  # as where a graph is retained
    if any(not same(one, found[-1]) for one in found):
        ks = ", ".join(dict.fromkeys(shown(one.selection) for one in found))
        raise RuntimeError(
            f"checkpointed passes with the same input, at k = {ks}, wait for their backward pass and cannot be told apart: {REMEDY}"
        )
    return found[-1]


def same(one: Pass, other: Pass) -> bool:
    """Return whether two passes with the same input read the same besides it."""
    pairs = [(one.real_N, other.real_N), (one.tokens, other.tokens)]
    if type(one.selection) is not type(other.selection):
        return False
    if isinstance(one.selection, TokenK):
        pairs.append((one.selection.values, other.selection.values))
    elif one.selection != other.selection:
        return False
    return all(first is second or (first is not None and second is not None and torch.equal(first, second)) for first, second in pairs)


def shown(selection: Selection) -> str:
    """A selection in words."""
    return f"up to {selection.largest}" if isinstance(selection, TokenK) else str(selection)


def check(before: Pass, losses: dict[str, Tensor]) -> None:
    """Mark a pass as repeated. RuntimeError if its losses were not in a graph but are in that of the repetition."""
    before.repeated.append(True)
    if before.losses_in_graph is False and in_graph(losses):
        raise RuntimeError(
            "auxiliary losses cannot be trained with reentrant gradient checkpointing, which computes them outside the graph: "
            "enable it with use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False}), or set balance_loss=0"
        )
