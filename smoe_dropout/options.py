"""Options of a method or router, declared as a frozen dataclass in its file. Does not import torch."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from smoe_dropout.registry import unknown


class ConfigError(ValueError):
    """An invalid configuration; the message lists every mistake."""


@dataclass(frozen=True)
class NoOptions:
    """No options."""


UNCHANGED = object()


def option(default: Any, *, earlier: Any = UNCHANGED, needs: str | None = None) -> Any:
    """A field of an options dataclass. earlier: the default that models had which were stored without this option, if it was another.
    needs: the option without which this one has no effect.
    """
    return field(default=default, metadata={"needs": needs} | ({} if earlier is UNCHANGED else {"earlier": earlier}))


def earlier_options(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, the others as they were by default when models were stored without them."""
    return {entry.name: entry.metadata["earlier"] for entry in fields(cls) if "earlier" in entry.metadata} | dict(given)


def stored_options(built: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options and, from the options built of them, those whose default has changed, so that a folder says which it is."""
    return {entry.name: getattr(built, entry.name) for entry in fields(built) if "earlier" in entry.metadata} | dict(given)


def option_names(classes: Iterable[type]) -> dict[str, Any]:
    """All options of these classes with their defaults."""
    return {field.name: field.default for cls in classes for field in fields(cls)}


def build_options(cls: type, values: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Any:
    """Build `cls` from those `values` that are its fields; strings such as "0.5" or "true" are converted to the field's type.

    Raises ConfigError for a name that is neither a field nor in `known`, a value of the wrong type, or one that `cls` rejects. Warns of an
    option that has no effect without another.
    """
    known = option_names([cls]) if known is None else known
    if foreign := [name for name in values if name not in known]:
        listed = ", ".join(f"{name}={default}" for name, default in known.items()) or "none"
        raise ConfigError(f"unknown option {', '.join(foreign)}; options and their defaults: {listed}")
    types = get_type_hints(cls)
    own = {field.name for field in fields(cls)}
    built = cls(**{name: _convert(name, value, types[name]) for name, value in values.items() if name in own})
    for entry in fields(cls):
        needed = entry.metadata.get("needs")
        if needed and entry.name in values and not getattr(built, needed):
            warnings.warn(f"option {entry.name} = {values[entry.name]} has no effect without {needed}", stacklevel=2)
    return built


def _convert(name: str, value: Any, kind: Any) -> Any:
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
        if kind in (int, float) and (isinstance(value, bool) or not math.isfinite(float(value))):
            raise ValueError
        if kind is int and not float(value).is_integer():
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        kinds = {int: "a whole number", float: "a finite number", bool: "True or False"}
        raise ConfigError(f"option {name} = {value!r} must be {kinds.get(kind, kind.__name__)}") from None


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
