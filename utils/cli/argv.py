"""Reading an argument vector: before the flags are parsed, and by tyro. Imports no torch."""

from pathlib import Path
from typing import TypeVar

import tyro

from utils.flags.fields import REFUSED, Flags

FlagsOf = TypeVar("FlagsOf", bound=Flags)


def from_command_line(argv: list[str], defaults: FlagsOf, program: str = "train.py") -> FlagsOf:
    """The defaults with what the command line says over them."""
    return tyro.cli(type(defaults), args=argv, default=defaults, prog=program, config=(tyro.conf.HelptextFromCommentsOff,))


def without_refused(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line without official flags that are refused and their values, and a sentence for each of them."""
    kept, mistakes, refused = [], [], False
    for word in argv:
        if word.startswith("--"):
            flag = word.split("=")[0]
            name = flag.removeprefix("--").replace("-", "_")
            refused = name in REFUSED
            if refused:
                mistakes.append(f"{flag}: {REFUSED[name]}")
        if not refused:
            kept.append(word)
    return kept, mistakes


def value_of(argv: list[str], name: str) -> str | None:
    """The last value of --name on the command line, before the whole of it can be parsed."""
    value = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word in (f"--{name}", f"--{name.replace('_', '-')}"):
            value = following
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def named_data(argv: list[str]) -> dict[str, str]:
    """A text given as a folder has the folder's name, unless the command line says another."""
    return {"dataset": Path(data).name} if (data := value_of(argv, "data")) else {}
