"""Reads the argument vector of a program: single values before the defaults are known, then all flags. Imports no torch."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

from smoe_dropout.registry import unknown
from utils.flags.check import refuse
from utils.flags.declare import FlagsT, Spec, groups, specs

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
EPILOG = "-h, --help shows this. --no_NAME turns a switch off. In names, - and _ are the same. The last value of a flag counts."
MAX_LISTED = 16  # most choices listed in --help
LONGEST = 60  # characters of a value that a refusal shows


class Arguments:
    """A command line: flags with at most one value each; the last value given counts.

    refused: flags with the reason. given: the text of each flag by plain name, None without one. mistakes: reasons for the refused flags
    given, and words that belong to no flag.
    """

    def __init__(self, program: str, words: Sequence[str], refused: Mapping[str, str]):
        self.program, self.mistakes, self.given = program, [], {}
        self.asks_for_help, awaiting = False, None  # the flag that the next word is the value of
        for word in words:
            flag, sign, value = word.partition("=")
            if word in ("-h", "--help"):
                self.asks_for_help = True
            elif word.startswith("--"):
                awaiting = _plain(flag)
                if awaiting in refused:
                    self.mistakes.append(f"{flag}: {refused[awaiting]}")
                else:
                    self.given[awaiting] = value if sign else None
            elif awaiting in refused:
                continue
            elif awaiting is None or self.given[awaiting] is not None:
                self.mistakes.append(f"{word!r} is not the value of a flag: leave it out")
            else:
                self.given[awaiting] = word

    def get(self, name: str) -> str | None:
        """The value given for a flag, readable before the defaults for parsing are known; None if it is empty."""
        return self.given.get(name) or None

    def has(self, name: str) -> bool:
        """Return whether a switch is given."""
        return name in self.given

    def over(self, kind: type[FlagsT], defaults: dict[str, Any]) -> FlagsT:
        """The given flags, all others from `defaults` or as declared. UserError for flags that are unknown, missing or not of their type.

        With --help, prints the help and ends the process.
        """
        declared, types = specs(kind), {field.name: field.type for field in dataclasses.fields(kind)}
        if self.asks_for_help:
            self._show_help(kind, defaults)
        fields = {spec.name or name: name for name, spec in declared.items()}
        values, unreadable = dict(defaults), []
        for option, text in self.given.items():
            switch = option.removeprefix("no_") if option not in fields else option
            name = fields.get(switch)
            if name is None or (switch != option and types[name] is not bool):
                unreadable.append(f"--{option}: " + unknown("flag", option, list(fields)).partition("; known")[0])
                continue
            try:
                values[name] = switch == option if types[name] is bool and text is None else _value(text, types[name], declared[name])
            except ValueError as error:
                unreadable.append(f"--{option}{'' if text is None else f' {text[:LONGEST]}'} {error}")
        required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
        absent = [declared[name].name or name for name in required if name not in values]
        refuse([*self.mistakes, *unreadable, *(f"--{option} is missing" for option in absent)] if unreadable or absent else [])
        return kind(**{name: value for name, value in values.items() if name in types})

    def _show_help(self, kind: type, defaults: dict[str, Any]) -> None:
        layout = partial(argparse.HelpFormatter, max_help_position=26)
        parser = argparse.ArgumentParser(self.program, "%(prog)s [flags]", kind.__doc__, EPILOG, formatter_class=layout, add_help=False)
        fields, declared = {field.name: field for field in dataclasses.fields(kind)}, specs(kind)
        for title, group in groups(kind).items():
            if title in getattr(kind, "hidden", ()):
                continue
            box = parser.add_argument_group(title)
            for name in vars(group)["__annotations__"]:
                box.add_argument(f"--{declared[name].name or name}", **_described(fields[name], declared[name], defaults))
        parser.print_help()
        sys.exit()


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


def _value(text: str | None, kind: Any, spec: Spec) -> Any:
    """A value of the flag's type. ValueError, with the rest of a sentence, for a text that is none."""
    kind = (get_args(kind) or (kind,))[0]  # of `int | None`
    if kind is bool:
        raise ValueError("is a switch: give it without a value")
    if text is None:
        raise ValueError("needs a value")
    if "verbatim" in spec.roles:
        return text
    if not text:
        raise ValueError("is empty: give a value, or leave it out")
    if kind is str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8: choose another") from None
        return text
    try:
        return kind(text.encode("ascii").decode())
    except ValueError:
        raise ValueError(f"must be a {'whole ' * (kind is int)}number") from None


def _described(field: dataclasses.Field, spec: Spec, defaults: dict[str, Any]) -> dict[str, Any]:
    """A flag as argparse shows it: its value, or its choices if they are few, what it is for, and its default."""
    kind, *_ = get_args(field.type) or (field.type,)  # of `int | None`
    text, default = f"{', '.join(spec.only)}: {spec.help}" if spec.only else spec.help, defaults.get(field.name, field.default)
    value = spec.metavar or METAVARS.get(kind)
    if spec.choices is not None and len(spec.choices) <= MAX_LISTED:
        value = f"{{{','.join(spec.choices)}}}"
        if len(value) > LONGEST:
            value, text = "NAME", f"{text}. One of {', '.join(spec.choices)}"
    if default is dataclasses.MISSING:
        text += " (required)"
    elif default is not None and default is not False and default != "":
        text += f" (default: {default})"
    return {"help": text.replace("%", "%%"), **({"metavar": value} if value else {"action": "store_true"})}
