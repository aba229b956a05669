"""Configuration of a transformers model that also describes its experts. Importing this module does not import transformers."""

import copy
import json
import os
import sys
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.registry import PACKAGE as NAME  # the model type in config.json


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether the model is a PreTrainedModel."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


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
    """Copy of a PreTrainedConfig that also describes the experts, after those of earlier conversions."""
    copied = copy.deepcopy(config)
    if isinstance(config, Described):
        before = getattr(copied, NAME)
        setattr(copied, NAME, [*(before if isinstance(before, list) else [before]), asdict(experts)])
    else:
        copied.__class__ = _described_class(type(config))
        setattr(copied, NAME, asdict(experts))
    return copied


def plain(config: Described) -> Any:
    """Copy of the configuration without the experts: an ordinary PreTrainedConfig."""
    copied = copy.copy(config)
    copied.__class__ = type(config).__mro__[2]
    delattr(copied, NAME)
    return copied


def conversions_of(config: Any) -> list[SMoEConfig]:
    """Configurations of the conversions that made the model, in order. ConfigError for invalid fields.

    config: a model's configuration, or the dict in config.json.
    """
    stored = config.get(NAME) if isinstance(config, dict) else getattr(config, NAME, None)
    return [SMoEConfig.from_dict(dict(entry)) for entry in (stored if isinstance(stored, list) else [stored] if stored else [])]
