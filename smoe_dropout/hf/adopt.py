"""Models of the transformers library with experts: their loss has the auxiliary losses in it, and their configuration tells of the experts.

Both so that transformers' own Trainer, `generate` and `save_pretrained` can be used as they are. Importing this imports no transformers.
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

NAME = __package__  # the model type in config.json, and the key that the experts' configuration stands under


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether it is a PreTrainedModel."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def adopt(model: nn.Module, config: SMoEConfig) -> None:
    """Told by `moefy` that a PreTrainedModel has experts now."""
    before, told = model.config, described(model.config, config)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, told)
    if not normalises_by_items(model):
        model.accepts_loss_kwargs = False
    model.register_forward_hook(add_auxiliary_loss, with_kwargs=True)


class Described:
    """Mixed into a configuration class: config.json names this library as the model's type, and has the host's settings under "host" and a
    sentence in place of one of its sizes, so that no class of transformers loads the model and drops its experts. In memory it is the
    host's.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        host = json.loads(self.to_json_string(use_diff))
        told = {
            "model_type": NAME,
            "host_model_type": host.pop("model_type"),  # not within "host": transformers would find the host's settings by it
            "architectures": host.get("architectures"),
            "transformers_version": host.get("transformers_version"),
            a_size(type(self)): f"{NAME}.from_pretrained(folder) loads this model, and nothing else does",
            NAME: host.pop(NAME),
            "host": host,
        }
        Path(json_file_path).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def __reduce__(self):
        return _restored, (type(self).__mro__[2],), self.__dict__


@cache
def _described_class(kind: type) -> type:
    return type(kind.__name__, (Described, kind), {})


def a_size(kind: type) -> str:
    """The name of a whole number that this kind of configuration has and not every kind."""
    from transformers import PreTrainedConfig

    common = {entry.name for entry in fields(PreTrainedConfig)}
    return next((entry.name for entry in fields(kind) if entry.type in (int, "int") and entry.name not in common), "hidden_size")


def _restored(kind: type) -> Described:
    described_kind = _described_class(kind)
    return described_kind.__new__(described_kind)


def described(config: Any, experts: SMoEConfig) -> Described:
    """A copy of a PreTrainedConfig that tells of the experts."""
    told = copy.deepcopy(config)
    told.__class__ = _described_class(type(config))
    setattr(told, NAME, asdict(experts))
    return told


def normalises_by_items(model: nn.Module) -> bool:
    """Whether the model divides the sum of its loss by `num_items_in_batch`: the `loss_function` of language models does; that of a
    classifier and a loss of its own in `forward` do not, although the Trainer, seeing **kwargs, takes it for granted (and then accumulates
    a sum of means).
    """
    names = inspect.unwrap(type(model).forward).__code__.co_names
    return "loss_function" in names and _loss(model) is not None and getattr(model, "accepts_loss_kwargs", True)


def _loss(model: nn.Module) -> Any:
    """The loss of a language model, or None for any other model's."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or type(model).__name__, None)
    if loss is None and getattr(model, "loss_type", None) is None:
        loss = ForCausalLMLoss  # what transformers takes for a model that names none
    return loss if loss in (ForCausalLMLoss, ForMaskedLMLoss) else None


def add_auxiliary_loss(model: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> Any:
    """A forward hook: in training, the loss that the model returns has the auxiliary losses in it.

    Given `num_items_in_batch` the model's loss is a part of a mean over several micro-batches, which add up; the auxiliary losses then
    count by this one's share of the items.
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
    """Labels that count in the loss, as the Trainer counts them: those of a causal model from the second position on."""
    if shift_labels is not None:
        return (shift_labels != -100).sum()
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifted = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not model.config.is_encoder_decoder
    return ((labels[..., 1:] if shifted else labels) != -100).sum()
