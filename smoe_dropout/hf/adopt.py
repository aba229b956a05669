"""Transformers models with MoE layers: their loss includes the auxiliary losses, and their configuration describes the experts.

With this, transformers' own Trainer, `generate` and `save_pretrained` work unchanged. Importing this module does not import transformers.
"""

import copy
import inspect
import json
import os
import sys
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import auxiliary_loss, auxiliary_losses
from smoe_dropout.registry import PACKAGE as NAME  # the model type in config.json


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether the model is a PreTrainedModel."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def adopt(model: nn.Module, config: SMoEConfig) -> None:
    """Set up a PreTrainedModel that `moefy` has converted; any other model is left alone."""
    if not is_pretrained_model(model):
        return
    before, after = model.config, described(model.config, config)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, after)
    if not normalises_by_items(model):
        model.accepts_loss_kwargs = False
    model.register_forward_hook(add_auxiliary_loss, with_kwargs=True)


class Described:
    """Mixin of a configuration class that changes only how it is saved.

    config.json has this library as the model type, the host's settings under "host", and a message in place of one of the host's sizes, so
    that no class of transformers can load the model and silently drop its experts.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write config.json; overrides PreTrainedConfig."""
        host = json.loads(self.to_json_string(use_diff))
        stored = {
            "model_type": NAME,
            "host_model_type": host.pop("model_type"),  # not inside "host", where transformers would recognise the host's settings by it
            "architectures": host.get("architectures"),
            "transformers_version": host.get("transformers_version"),
            size_field(type(self)): f"load this model with {NAME}.from_pretrained(folder)",
            NAME: host.pop(NAME),
            "host": host,
        }
        Path(json_file_path).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")

    def __reduce__(self):
        return _restored, (type(self).__mro__[2],), self.__dict__


@cache
def _described_class(kind: type) -> type:
    return type(kind.__name__, (Described, kind), {})


def size_field(kind: type) -> str:
    """Name of an integer field that is specific to this configuration class."""
    from transformers import PreTrainedConfig

    common = {entry.name for entry in fields(PreTrainedConfig)}
    return next((entry.name for entry in fields(kind) if entry.type in (int, "int") and entry.name not in common), "hidden_size")


def _restored(kind: type) -> Described:
    described_kind = _described_class(kind)
    return described_kind.__new__(described_kind)


def described(config: Any, experts: SMoEConfig) -> Described:
    """Copy of a PreTrainedConfig that also describes the experts."""
    copied = copy.deepcopy(config)
    copied.__class__ = _described_class(type(config))
    setattr(copied, NAME, asdict(experts))
    return copied


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
