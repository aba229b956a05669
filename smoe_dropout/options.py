"""Options of a method or a router: fields of a frozen dataclass in its own file. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from smoe_dropout.registry import unknown


class ConfigError(ValueError):
    """A configuration that cannot be; the text lists every mistake, one sentence each."""


@dataclass(frozen=True)
class NoOptions:
    """Of what has nothing to set."""


def option_names(classes: Iterable[type]) -> dict[str, Any]:
    """All options of these classes with their defaults."""
    return {field.name: field.default for cls in classes for field in fields(cls)}


def build_options(cls: type, values: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Any:
    """`cls` filled with those of `values` that are its fields; words such as "0.5" or "true" are read as the field's type.

    Raises ConfigError for a name that is neither a field nor in `known`, a value of another type, or one that `cls` refuses.
    """
    known = option_names([cls]) if known is None else known
    if foreign := [name for name in values if name not in known]:
        listed = ", ".join(f"{name}={default}" for name, default in known.items()) or "none"
        raise ConfigError(f"option {', '.join(foreign)} is not known here; options and their defaults: {listed}")
    types = get_type_hints(cls)
    own = {field.name for field in fields(cls)}
    return cls(**{name: _read(name, value, types[name]) for name, value in values.items() if name in own})


def _read(name: str, value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if choices:
        if value not in choices:
            raise ConfigError(unknown(f"value of option {name}", str(value), list(choices)))
        return value
    words = {"true": True, "1": True, "false": False, "0": False}
    try:
        if kind is bool and isinstance(value, str):
            return words[value.lower()]
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and not float(value).is_integer():
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"option {name} = {value!r} must be of type {kind.__name__}") from None


def require(condition: bool, sentence: str) -> None:
    """ConfigError with the sentence unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)
