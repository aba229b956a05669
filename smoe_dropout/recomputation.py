"""Support for activation checkpointing, which repeats a layer's forward pass during the backward pass.

torch repeats the code and the random numbers. It does not know what a layer reads besides its input: k, padding, token ids, state passed
between layers. If that has changed since the original pass, gradients would be silently wrong, so the repeated pass is compared with the
original.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

REMEDY = "call backward() right after the pass it belongs to, or train without gradient checkpointing"


class Pass(NamedTuple):
    """Record of a layer's pass: k, a sample of its input, whether its losses are in a graph (None: it had none), and its real tokens.

    buffers: by name, those that the pass changed, as they were before it.
    """

    top_k: int
    sample: Tensor | None
    losses_in_graph: bool | None
    real_N: Tensor | None
    buffers: Mapping[str, Tensor] = {}


def recomputing() -> bool:
    """Whether this is a repeated pass, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def record_pass(x: Tensor, top_k: int, losses: dict[str, Tensor], real_N: Tensor | None, training: bool) -> Pass | None:
    """Record of this pass for `check`; None in inference.

    The input is sampled only if the pass may be repeated: saved tensors are packed by hooks, or gradients are off in training mode.
    """
    if not hooked() and not training:
        return None
    return Pass(top_k, sampled(x) if hooked() or not torch.is_grad_enabled() else None, in_graph(losses), real_N)


def hooked() -> bool:
    """Whether hooks pack the tensors that autograd saves, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's buffers by name, if the pass that begins may be repeated; else none."""
    repeated = hooked() or (module.training and not torch.is_grad_enabled())
    return {name: buffer.clone() for name, buffer in module.named_buffers()} if repeated else {}


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
    """Whether shapes and values are equal, counting NaN as equal to NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def in_graph(losses: dict[str, Tensor]) -> bool | None:
    """Whether any loss requires a gradient; None without losses."""
    return any(loss.requires_grad for loss in losses.values()) if losses else None


def original(records: Sequence[Pass | None], x: Tensor) -> Pass | None:
    """The record of the pass that had this input; a layer that is used several times has several."""
    sample = sampled(x)
    return next((one for one in records if one is not None and (one.sample is None or identical(one.sample, sample))), None)


def check(records: Sequence[Pass | None], x: Tensor, top_k: int, losses: dict[str, Tensor]) -> None:
    """Raise RuntimeError unless the repeated pass matches an original one."""
    if differing := [one.top_k for one in records if one is not None and one.top_k != top_k]:
        raise RuntimeError(f"a checkpointed pass ran at k = {differing[0]} but is recomputed at k = {top_k}: {REMEDY}")
    before = original(records, x)
    if before is None:
        raise RuntimeError(f"another pass of the model ran between a checkpointed pass and its backward pass: {REMEDY}")
    if before.losses_in_graph is False and in_graph(losses):
        raise RuntimeError(
            "auxiliary losses cannot be trained with reentrant gradient checkpointing, which computes them outside the graph: "
            "enable it with use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False}), or set balance_loss=0"
        )
