"""What activation checkpointing asks of a layer: a pass that is repeated within the backward pass must be the pass that ran before.

torch repeats the code and the random numbers. What it cannot know is what a layer reads besides its input: k, token ids, a state carried
from layer to layer. Where that has changed, gradients would be silently wrong.
"""

from typing import NamedTuple

import torch
from torch import Tensor

REMEDY = "call backward() right after the pass it belongs to, or train without gradient checkpointing"


class Pass(NamedTuple):
    """What one pass ran with: k, a sample of its input, and whether its losses are part of a graph (None: it had none)."""

    top_k: int
    sample: Tensor | None
    losses_in_graph: bool | None


def recomputing() -> bool:
    """Whether this is a repeated pass, within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def remembered(x: Tensor, top_k: int, losses: dict[str, Tensor], training: bool) -> Pass | None:
    """To be compared with later. The input is sampled only where the pass may be repeated: tensors packed by hooks, or gradients off in
    training. None in inference.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if not hooked and not training:
        return None
    return Pass(top_k, sampled(x) if hooked or not torch.is_grad_enabled() else None, in_graph(losses))


def sampled(x: Tensor) -> Tensor:
    """Some values of the input, enough to tell one pass from another."""
    flat = x.detach().flatten()
    return flat[:: max(flat.numel() // 64, 1)].clone()


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal, a NaN to a NaN too."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def in_graph(losses: dict[str, Tensor]) -> bool | None:
    return any(loss.requires_grad for loss in losses.values()) if losses else None


def check(before: Pass | None, x: Tensor, top_k: int, losses: dict[str, Tensor]) -> None:
    """RuntimeError unless the repeated pass is the one before."""
    if before is not None and before.top_k != top_k:
        raise RuntimeError(f"a checkpointed pass ran at k = {before.top_k}, and is repeated for its gradient at k = {top_k}: {REMEDY}")
    if before is None or (before.sample is not None and not alike(before.sample, sampled(x))):
        raise RuntimeError(f"another pass of the model ran between a checkpointed pass and its gradient: {REMEDY}")
    if before.losses_in_graph is False and in_graph(losses):
        raise RuntimeError(
            "auxiliary losses cannot be trained with reentrant gradient checkpointing, which computes them outside the graph: "
            "enable it with use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False}), or set balance_loss=0"
        )
