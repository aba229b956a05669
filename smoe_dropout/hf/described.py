"""Configuration of a transformers model that also describes its experts. Imports neither torch nor transformers.

The attribute `registry.PACKAGE` of such a configuration holds the fields of an `SMoEConfig`, or a list of them after several conversions,
in their order. An entry with "module" was a conversion of that part of the model.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from smoe_dropout.config import SMoEConfig
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import METHODS, ROUTER_ALIASES, ROUTERS
from smoe_dropout.registry import PACKAGE as NAME  # the model type in config.json

CODE = f"{NAME}_auto"  # the module beside config.json that transformers imports with trust_remote_code=True
CODE_TEXT = f'''"""Lets the auto classes of transformers load this model: from_pretrained(..., trust_remote_code=True). Needs {NAME}."""

from {NAME}.hf.auto import ConfigWithExperts  # noqa: F401
'''


class Conversion(NamedTuple):
    """One call of `moefy`: `module` is the dotted name of the converted part, "" for the whole model."""

    module: str
    config: SMoEConfig


def is_pretrained_model(model: Any) -> bool:
    """Return whether the model is a PreTrainedModel."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


class Described:
    """Mixin of a configuration class that changes only how it is saved.

    config.json has this library as the model type, the host's settings under "host", and a message in place of one of the host's sizes, so
    that no class of transformers can load the model and silently drop its experts.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write config.json and the module for trust_remote_code; overrides PreTrainedConfig."""
        path, host = Path(json_file_path), json.loads(self.to_json_string(use_diff))
        stored = {
            "model_type": NAME,
            "host_model_type": host.pop("model_type"),  # not inside "host", where transformers would recognise the host's settings by it
            "architectures": host.get("architectures"),
            "transformers_version": host.get("transformers_version"),
            "auto_map": {"AutoConfig": f"{CODE}.ConfigWithExperts"},
            size_field(type(self)): f"load this model with AutoModel after `import {NAME}`, or with {NAME}.from_pretrained(folder)",
            NAME: host.pop(NAME),
            "host": host,
        }
        path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        path.with_name(f"{CODE}.py").write_text(CODE_TEXT, encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what `to_json_file` writes, or the host's own format; overrides PreTrainedConfig."""
        return read(config_dict, **kwargs) if config_dict.get("model_type") == NAME else super().from_dict(config_dict, **kwargs)

    def __reduce__(self):
        return _restored, (type(self).__mro__[2],), self.__dict__


@cache
def _described_class(kind: type) -> type:
    ignored = [*getattr(kind, "keys_to_ignore_at_inference", []), "aux_loss", "router_logits"]  # by the Trainer, which would collect them
    return type(kind.__name__, (Described, kind), {"keys_to_ignore_at_inference": ignored})


def size_field(kind: type) -> str:
    """Name of an integer field that is specific to this configuration class."""
    from transformers import PreTrainedConfig

    common = {entry.name for entry in fields(PreTrainedConfig)}
    return next((entry.name for entry in fields(kind) if entry.type in (int, "int") and entry.name not in common), "hidden_size")


def _restored(kind: type) -> Described:
    described_kind = _described_class(kind)
    return described_kind.__new__(described_kind)


def entries_of(config: Any) -> list[dict[str, Any]]:
    """Stored descriptions of a configuration's conversions, in their order; empty for a configuration without experts."""
    return listed(getattr(config, NAME, None))


def listed(stored: Any) -> list[Any]:
    """Entries of a stored description, which is a single one or a list."""
    return [] if stored is None else list(stored) if isinstance(stored, list) else [stored]


def placed_conversions(config: Any) -> list[Conversion]:
    """Conversions that a configuration describes, with the part of the model that each was applied to.

    Raises ConfigError for an entry that is not a valid SMoEConfig, and for a router or method that this process does not know.
    """
    return [_conversion(entry) for entry in entries_of(config)]


def _conversion(entry: Any) -> Conversion:
    if not isinstance(entry, dict):
        raise ConfigError(f"{NAME} in the configuration is {entry!r}, not the fields of an SMoEConfig")
    for kind, known in (("router", {**ROUTERS, **ROUTER_ALIASES}), ("method", METHODS)):
        if isinstance(name := entry.get(kind), str) and name not in known:
            raise ConfigError(
                f"the model has the {kind} {name!r}, which is not registered in this process: before loading, set "
                f"{NAME}.registry.{kind.upper()}S[{name!r}] = 'module:Class', and let Python find that module"
            )
    try:
        return Conversion(entry.get("module", ""), SMoEConfig.stored({name: value for name, value in entry.items() if name != "module"}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{NAME} in the configuration is not valid: {error}") from None


def entry_of(conversion: Conversion) -> dict[str, Any]:
    """Stored description of a conversion."""
    return ({"module": conversion.module} if conversion.module else {}) | asdict(conversion.config)


def described(config: Any, entries: list[dict[str, Any]]) -> Described:
    """Copy of a PreTrainedConfig that describes these conversions."""
    copied = copy.deepcopy(config)
    copied.__class__ = _described_class(type(plain(config)))
    setattr(copied, NAME, entries[0] if len(entries) == 1 else entries)
    return copied


def plain(config: Any) -> Any:
    """Copy of the configuration without experts: an ordinary PreTrainedConfig."""
    copied = copy.copy(config)
    if isinstance(copied, Described):
        copied.__class__ = type(copied).__mro__[2]
        delattr(copied, NAME)
    return copied


def read(stored: dict[str, Any], **kwargs: Any) -> Any:
    """The host's configuration with experts that config.json describes, changed by `kwargs` as in PreTrainedConfig.from_dict.

    Raises ConfigError for contents that describe no model, or one that this process cannot build.
    """
    host = stored.get("host")
    if not isinstance(host, dict):
        raise ConfigError("it is damaged: host is missing")
    if fault := next(foreign(host, "host"), None):
        raise ConfigError(fault)
    if not isinstance(names := stored.get("architectures"), list | None) or not all(isinstance(name, str) for name in names or ()):
        raise ConfigError(f"it is damaged: architectures is {names!r}, not a list of names")
    if "attn_implementation" in kwargs:  # the caller's takes precedence
        host = {name: value for name, value in host.items() if not is_attention(name)}
    if (kind := _host_class(stored)) is None:
        raise ConfigError(f"it describes a {stored.get('host_model_type')!r} model, which transformers does not know")
    if not (entries := listed(stored.get(NAME))):
        raise ConfigError(f"it is damaged: {NAME} is missing")
    with_unused = kwargs.pop("return_unused_kwargs", False)
    kwargs.pop("model_type", None)
    config, unused = kind.from_dict(dict(host), return_unused_kwargs=True, **kwargs)
    config = described(config, entries)
    config.architectures = stored.get("architectures")
    placed_conversions(config)
    return (config, unused) if with_unused else config


def foreign(value: Any, place: str) -> Iterator[str]:
    """Sentence for each setting of a host that would make transformers run code or read files from elsewhere, or that is not a number.

    What the caller asks for by an argument of from_pretrained is not among these.
    """
    if isinstance(value, float) and math.isnan(value):
        yield f"it is damaged: {place} is not a number"
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        here = f"{place}.{name}"
        if is_attention(name):
            known = {None, "eager", *_attention()}
            if wrong := [one for one in _leaves(entry) if not isinstance(one, str | None) or one not in known]:
                yield (
                    f"{here} = {wrong[0]!r} is not an attention of transformers itself, but may be code from elsewhere: if you trust it, "
                    "remove it there and pass attn_implementation to from_pretrained"
                )
        elif name == "quantization_config" and entry is not None and place != "host":  # `load` refuses that of the whole model
            yield f"{here}: experts are not quantised: remove it"
        elif name == "transformers_weights" and entry is not None:
            yield f"{here} = {entry!r} names other weights than those of the folder: remove it"
        elif name in ("backbone", "architecture") and isinstance(entry, str) and any(mark in entry for mark in "/:\\"):
            yield f"{here} = {entry!r} names a model elsewhere: remove it"
        else:
            yield from foreign(entry, here)


def is_attention(name: object) -> bool:
    """Return whether a setting of this name chooses the implementation of attention."""
    return str(name).strip("_").removesuffix("_internal") == "attn_implementation"


def _attention() -> list[str]:
    """Names of the attentions of transformers, and of those registered in this process, that are no kernels of the hub."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "/" not in name]


def _leaves(value: Any) -> list[Any]:
    return [leaf for entry in value.values() for leaf in _leaves(entry)] if isinstance(value, dict) else [value]


def _host_class(stored: dict[str, Any]) -> type | None:
    """Configuration class of the host that config.json names."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    host = stored.get("host_model_type")
    if host in CONFIG_MAPPING:
        return CONFIG_MAPPING[host]
    kinds = (getattr(getattr(transformers, str(name), None), "config_class", None) for name in stored.get("architectures") or [])
    return next((kind for kind in kinds if kind is not None and kind.model_type == host), None)  # that of a part of a model
