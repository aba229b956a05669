"""Checks of the arguments of public functions: a value of the wrong kind or out of range is a ConfigError before anything is changed.

Importing this module does not import torch.
"""

import math
import os
import sys
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from smoe_dropout.options import ConfigError, require

LARGEST = 2**31 - 1  # of anything that is counted in a model: experts, k, ranks
SEEDS = (-(2**63), 2**63 - 1)  # that torch's generators take


def plain(value: Any) -> Any:
    """A number or truth value of numpy as Python's own; any other value unchanged."""
    numpy = sys.modules.get("numpy")
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def integer(name: str, value: Any, least: int | None = 1, most: int | None = LARGEST) -> int:
    """The value as a Python integer. ConfigError unless it is a whole number, Python's or numpy's, in this range."""
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if known and (least is None or least <= value) and (most is None or value <= most):
        return int(value)
    bounds = "" if least is None else f" of at least {least}{too_large(value, most)}" if least > -LARGEST else " of 64 bits"
    raise ConfigError(f"{name} = {shown(value)} must be a whole number{bounds}")


def too_large(value: Any, most: int | None = LARGEST) -> str:
    """Words for the end of a message about a number above the largest, else none."""
    return f" and at most {most}" if most is not None and isinstance(value, Real) and value > most else ""


def number(name: str, value: Any, least: float = 0.0) -> float:
    """The value as a Python float. ConfigError unless it is a finite number, Python's or numpy's, and not below `least`."""
    if not (is_finite(value) and value >= least):
        raise ConfigError(f"{name} = {shown(value)} must be a finite number of at least {least:g}")
    return float(value)


def is_finite(value: Any) -> bool:
    """Test for a real number, no truth value, that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def boolean(name: str, value: Any) -> bool:
    """The value as True or False. ConfigError for anything else, such as "false"."""
    if not isinstance(plain(value), bool):
        raise ConfigError(f"{name} = {shown(value)} must be True or False")
    return bool(value)


def path(name: str, value: Any) -> Path:
    """The value as a path. ConfigError for anything but a str or Path that is not empty."""
    if not isinstance(value, str | os.PathLike) or not (given := os.fspath(value)) or not isinstance(given, str) or "\0" in given:
        raise ConfigError(f"{name} = {shown(value)} must be a path")
    return Path(value)


def require_module(model: object) -> None:
    """Raise ConfigError for something that is not a model."""
    from torch import nn

    if not isinstance(model, nn.Module):
        hint = ": load the model first" if isinstance(model, str | Path) else ""
        raise ConfigError(f"model is a {type(model).__name__}, not an nn.Module{hint}")


def require_weights(model: Any) -> None:
    """Raise ConfigError if some of the model's tensors are on the meta device, where they have no values."""
    require_module(model)
    name = next((name for name, tensor in model.state_dict(keep_vars=True).items() if getattr(tensor, "is_meta", False)), None)
    require(name is None, f"{name} of the model is on the meta device and has no values: load its weights first")


def shown(value: Any) -> str:
    """The value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
