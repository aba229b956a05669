"""Reads the argument vector of a program: single values before parsing, then all flags with tyro. Imports no torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from utils.flags.declare import FlagsT, Spec, groups, specs

METAVARS = {"int": "INT", "float": "FLOAT", "str": "TEXT"}
MAX_LISTED = 16  # most choices listed in --help


class Arguments:
    """A command line. refused: flags with the reason. mistakes: reasons for the refused flags given, which are left out of `words`."""

    def __init__(self, program: str, words: Sequence[str], refused: Mapping[str, str]):
        self.program, self.words, self.mistakes, skipped = program, [], [], False
        for word in words:
            if word.startswith("--"):
                flag = word.partition("=")[0]
                skipped = _plain(flag) in refused
                if skipped:
                    self.mistakes.append(f"{flag}: {refused[_plain(flag)]}")
            if not skipped:
                self.words.append(word)

    def get(self, name: str) -> str | None:
        """The last value given for a flag, readable before the defaults for parsing are known."""
        value = None
        for word, following in zip(self.words, [*self.words[1:], ""], strict=False):
            flag, sign, rest = word.partition("=")
            if flag.startswith("--") and _plain(flag) == name:
                value = rest if sign else following or None
        return value

    def has(self, name: str) -> bool:
        """Whether a switch is given."""
        return f"--{name}" in {word.replace("-", "_").replace("__", "--", 1) for word in self.words}

    @property
    def asks_for_help(self) -> bool:
        return bool({"-h", "--help"} & set(self.words))

    def over(self, kind: type[FlagsT], defaults: dict[str, Any]) -> FlagsT:
        """The given flags, all others from `defaults` or as declared. A flag that cannot be parsed ends the process with exit code 2."""
        boxes, declared, hidden = groups(kind), specs(kind), getattr(kind, "hidden", ())
        nested = dataclasses.make_dataclass(
            kind.__name__, [_box(title, group, declared, defaults, title in hidden) for title, group in boxes.items()]
        )
        nested.__doc__ = kind.__doc__
        settings = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
        parsed = tyro.cli(nested, args=self.words, prog=self.program, use_underscores=True, config=settings)
        return kind(**{name: value for box in vars(parsed).values() for name, value in vars(box).items()})


class Values(dict):
    """Flags given as values by another program: `decide` takes them like `Arguments`."""

    mistakes: tuple[str, ...] = ()
    asks_for_help = False

    def has(self, name: str) -> bool:
        return bool(self.get(name))

    def over(self, kind: type[FlagsT], defaults: dict[str, Any]) -> FlagsT:
        return kind(**{**defaults, **self})


def _plain(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _box(title: str, group: type, declared: dict[str, Spec], defaults: dict[str, Any], hidden: bool) -> tuple[str, Any, Any]:
    """A group as a field of the class that tyro reads."""
    fields = []
    for field in dataclasses.fields(group):
        if field.name not in vars(group).get("__annotations__", {}):
            continue
        spec, default = declared[field.name], defaults.get(field.name, field.default)
        option = tyro.conf.arg(
            name=spec.name or field.name,
            help=f"{', '.join(spec.only)}: {spec.help}" if spec.only else spec.help,
            metavar=_metavar(field.type, spec),
            help_behavior_hint="" if default is None or default is False or default == "" else None,
        )
        options = {} if default is dataclasses.MISSING else {"default": default}
        fields.append((field.name, Annotated[field.type, option], dataclasses.field(**options, kw_only=True)))
    box = dataclasses.make_dataclass(group.__name__, fields)
    box.__doc__ = ""
    kind = Annotated[box, tyro.conf.arg(name=title)]
    return title.replace(" ", "_"), tyro.conf.Suppress[kind] if hidden else kind, dataclasses.field(kw_only=True)


def _metavar(kind: Any, spec: Spec) -> str | None:
    if spec.choices is not None and len(spec.choices) <= MAX_LISTED:
        return "{" + ",".join(spec.choices) + "}"
    if kind is bool:
        return None
    return spec.metavar or METAVARS[str(getattr(kind, "__name__", kind)).split(" | ")[0]]
