"""Model classes of transformers that respect a configuration with experts, instead of building and saving a dense model from it.

Importing this module changes four methods of PreTrainedModel, for configurations, folders and models with experts only: `from_pretrained`
and `_from_config`, which all auto classes and pipelines call, convert the model they build; a direct call of the class is refused;
`save_pretrained` refuses a model that its folder would not describe.
"""

import functools
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import try_to_load_from_cache

from smoe_dropout.control import moe_layers
from smoe_dropout.files import LARGEST, parse_json
from smoe_dropout.hf import loading, saving
from smoe_dropout.hf.described import NAME, Described
from smoe_dropout.hf.folder import CONFIG
from smoe_dropout.layer import without_k
from smoe_dropout.manifest import MANIFEST
from smoe_dropout.options import ConfigError

_init, _save_pretrained = PreTrainedModel.__init__, PreTrainedModel.save_pretrained
_from_pretrained, _from_config = PreTrainedModel.from_pretrained.__func__, PreTrainedModel._from_config.__func__


@functools.wraps(_init)
def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
    """Raises ConfigError for a configuration with experts."""
    if isinstance(config, Described):
        kind = type(self).__name__
        raise ConfigError(
            f"{kind}(config): this configuration describes a model with experts, and {kind} would be dense: build it by "
            f"AutoModel.from_config(config), or another auto class"
        )
    _init(self, config, *args, **kwargs)


@functools.wraps(_from_config)
def from_config(cls: type, config: Any, **kwargs: Any) -> PreTrainedModel:
    """Builds a model with experts for a configuration with experts."""
    return _from_config(loading.converting(cls) if isinstance(config, Described) else cls, config, **kwargs)


@functools.wraps(_from_pretrained)
def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """Loads a model with experts for a configuration with experts, given or in the folder."""
    if not isinstance(kwargs.get("config"), Described):
        if not has_experts(pretrained_model_name_or_path, kwargs):
            return _from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        if kwargs.get("config") is not None:
            raise ConfigError(
                f"{cls.__name__}.from_pretrained({str(pretrained_model_name_or_path)!r}): the model there has experts, and the given "
                f"{type(kwargs['config']).__name__} describes none: leave config out, and load the whole model as it was saved"
            )
        config, kwargs = loading.read_config(pretrained_model_name_or_path, kwargs)
        kwargs["config"] = config
    return loading.load(_from_pretrained, cls, pretrained_model_name_or_path, *args, **kwargs)


def has_experts(source: Any, named: dict[str, Any]) -> bool:
    """Return whether config.json of a folder, or of a repository that has been downloaded, is that of a model with experts."""
    name = os.path.join(named.get("subfolder", ""), CONFIG)
    found = os.path.join(source, name) if source is not None and os.path.isdir(source) else None
    if found is None and isinstance(source, str):
        with suppress(ValueError):  # not the id of a repository
            found = try_to_load_from_cache(source, name, named.get("cache_dir"), named.get("revision"))
    if not isinstance(found, str) or not os.path.isfile(found):
        return False
    with open(found, "rb") as file:
        content = file.read(LARGEST + 1)
    if f'"{NAME}"'.encode() not in content:
        return False
    stored = parse_json(content, found)
    return isinstance(stored, dict) and stored.get("model_type") == NAME


@functools.wraps(_save_pretrained)
def save_pretrained(
    self: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Raises ConfigError for a model whose experts the folder would not describe."""
    if moe_layers(self):
        saving.describe_for_saving(self)
        (Path(save_directory) / MANIFEST).unlink(missing_ok=True)  # of an earlier save
        state_dict = None if state_dict is None else saving.weights_of(self, state_dict)
    with without_k():
        _save_pretrained(self, save_directory, is_main_process, state_dict, *args, **kwargs)


if PreTrainedModel.__init__ is not init:
    PreTrainedModel.__init__, PreTrainedModel.save_pretrained = init, save_pretrained
    PreTrainedModel.from_pretrained, PreTrainedModel._from_config = classmethod(from_pretrained), classmethod(from_config)
