"""Auxiliary losses in the loss that a transformers model returns."""

import inspect
from typing import Any

from torch import Tensor, nn

from smoe_dropout.control import auxiliary_loss, auxiliary_losses


def normalises_by_items(model: nn.Module) -> bool:
    """Whether the model's loss is a sum divided by `num_items_in_batch`.

    True for the `loss_function` of language models, false for that of classifiers and for losses computed in `forward`. The Trainer assumes
    it for every model whose forward takes **kwargs, and would then accumulate a sum of means.
    """
    names = inspect.unwrap(type(model).forward).__code__.co_names
    return "loss_function" in names and _loss(model) is not None and getattr(model, "accepts_loss_kwargs", True)


def _loss(model: nn.Module) -> Any:
    """The loss function if it is a language model's, else None."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or type(model).__name__, None)
    if loss is None and getattr(model, "loss_type", None) is None:
        loss = ForCausalLMLoss  # transformers' default
    return loss if loss in (ForCausalLMLoss, ForMaskedLMLoss) else None


def add_auxiliary_loss(model: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> Any:
    """Forward hook that adds the auxiliary losses to the returned loss in training mode.

    With `num_items_in_batch` the model's loss is its part of a mean over several micro-batches, whose losses are summed; the auxiliary
    losses are then weighted by this micro-batch's fraction of the items.
    """
    if not model.training or not auxiliary_losses(model):
        return output
    auxiliary = auxiliary_loss(model)
    labels = named.get("labels")
    if labels is None and arguments:
        labels = inspect.signature(model.forward).bind_partial(*arguments).arguments.get("labels")
    whole = isinstance(output, dict)
    loss = output.get("loss") if whole else output[0] if labels is not None and isinstance(output, tuple) else None
    if loss is None:
        return output
    items = named.get("num_items_in_batch") if getattr(model, "accepts_loss_kwargs", True) else None
    if items is not None:
        auxiliary = auxiliary * (counted_items(model, labels, named.get("shift_labels")) / items)
    if not whole:
        return (loss + auxiliary, *output[1:])
    output["loss"] = loss + auxiliary
    return output


def counted_items(model: nn.Module, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | int:
    """Number of labels in the loss, counted as the Trainer does: from the second position on for causal models."""
    if shift_labels is not None:
        return (shift_labels != -100).sum()
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifted = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not model.config.is_encoder_decoder
    return ((labels[..., 1:] if shifted else labels) != -100).sum()
