"""Declaration of flags: default, help, roles and limits, each stated once. Imports no torch.

A program's flags are one flat frozen dataclass that inherits from its groups; a group is a dataclass of flags whose `title` heads a box of
--help, unless the program lists it as `hidden`. Parser, checks, run folders, records and surgery read this metadata and keep no list of
flags of their own.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

FlagsT = TypeVar("FlagsT")
ABSENT = object()  # `since` of a flag that every run folder has


@dataclass(frozen=True)
class Spec:
    """The metadata of a flag besides its type and default.

    roles: see utils/flags/fields.py. low, high: inclusive limits; above, below: exclusive ones; special: a value allowed besides.
    choices: the allowed values, if they are fixed. needs: the flag without which this one has no effect. follows: the flag from which this
    one is derived when it is not given. only: the --method values it applies to. since: its value in runs made before it existed.
    """

    help: str
    roles: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    special: int | None = None
    choices: Collection[str] | None = None
    needs: str | None = None
    follows: str | None = None
    only: tuple[str, ...] | None = None
    since: Any = ABSENT
    metavar: str | None = None
    name: str | None = None  # on the command line, if not the field's


def flag(default: Any, help: str, role: str = "", **metadata: Any) -> Any:
    """A field with its `Spec`. `default` dataclasses.MISSING: the flag is required. `role`: one or several, separated by spaces."""
    spec = Spec(help, tuple(role.split()), **metadata)
    if spec.follows and "run" not in spec.roles:
        spec = dataclasses.replace(spec, roles=(*spec.roles, "derived"))
    return dataclasses.field(default=default, metadata={"flag": spec})


def same_flag(kind: type, name: str, **changes: Any) -> Any:
    """The flag of another program, `changes` applied to its metadata."""
    source = kind.__dataclass_fields__[name]
    default = changes.pop("default", source.default)
    return dataclasses.field(default=default, metadata={"flag": dataclasses.replace(source.metadata["flag"], **changes)})


def specs(kind: type) -> dict[str, Spec]:
    """The metadata of every flag by name, in order of declaration."""
    return {field.name: field.metadata["flag"] for field in dataclasses.fields(kind)}


def groups(kind: type) -> dict[str, type]:
    """The groups of a program's flags by title."""
    return {vars(base)["title"]: base for base in reversed(kind.__mro__) if "title" in vars(base)}


def flags_from(values: dict[str, Any], kind: type[FlagsT]) -> FlagsT:
    """The flags in `values`; other entries are ignored, missing flags have their defaults."""
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})
