"""What a run inherits from the checkpoint it starts from. Imports no torch."""

import dataclasses
from typing import Any

from smoe_dropout.registry import METHODS, load, unknown
from utils.checkpoints.origin import Source
from utils.cli.argv import FlagsOf, value_of
from utils.errors import UserError
from utils.flags.derive import resolve
from utils.flags.fields import CHOICES, KEPT, OF_THE_EXPERTS, OF_THE_MODEL, Flags
from utils.flags.presets import PRESETS


def preset_of(source: Source, argv: list[str]) -> str:
    """The command line's, or else the checkpoint's. UserError for one there is not."""
    preset = value_of(argv, "preset") or source.flags.get("preset", Flags.preset)
    if preset not in CHOICES["preset"]:
        raise UserError("--preset: " + unknown("preset", preset, list(CHOICES["preset"])))
    return preset


def decided(flags: FlagsOf, source: Source, mistakes: list[str]) -> FlagsOf:
    """With every default decided; the method is the checkpoint's, also where that is none. UserError where there are mistakes."""
    if mistakes:
        raise UserError("; ".join(mistakes) + " (nothing was started; --help lists all flags)")
    flags = resolve(flags)
    return dataclasses.replace(flags, method=None) if source.flags.get("method", "") is None else flags


def of_the_checkpoint(source: Source, preset: str, argv: list[str]) -> dict[str, Any]:
    """The checkpoint's flags of the model. Weights alone have what preset and method say in pre-training. UserError for an unknown name."""
    known = source.flags
    model = known.get("model") or value_of(argv, "model") or Flags.model
    if model not in PRESETS:
        raise UserError("--model: " + unknown("model", model, list(PRESETS)))
    method = known.get("method") or value_of(argv, "method")
    if method is not None and method not in METHODS:
        raise UserError("--method: " + unknown("method", method, METHODS))
    values: dict[str, Any] = {}
    if "preset" not in known:
        values = {**PRESETS[model][preset], **(load(METHODS, "method", method).flags if method else {})}
    values = {**values, **known, "model": model, "method": method}
    return {name: value for name, value in values.items() if name in (*OF_THE_MODEL, *OF_THE_EXPERTS, *KEPT)}


def contradictions(flags: Flags, source: Source) -> list[str]:
    """What the command line says otherwise than the checkpoint."""
    known = source.flags
    return [
        f"--{name} {getattr(flags, name)}, but the checkpoint {source.path} has {name} = {known[name]}: leave it out"
        for name in (*OF_THE_MODEL, *OF_THE_EXPERTS)
        if name in known and getattr(flags, name) != known[name]
    ]
