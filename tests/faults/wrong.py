"""Wrong command lines: those of tests/harness/wrong_commands.py, each said to the program itself."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults.judge import LEFTOVER, TOO_SLOW, TRACEBACK, UNCLEAR, UNNAMED, Failure, names_in
from tests.faults.programs import run
from tests.faults.world import World, locked
from tests.harness import wrong_commands as table

CASES = {
    "programs": lambda: table.written(table.WRITTEN),
    "flags": table.generated,
    "scripts": lambda: table.written(table.BY_PROCESS),
}
CLASSES = {"traceback": TRACEBACK, "slow": TOO_SLOW, "does not say": UNNAMED}


def prepare(world: World) -> None:
    """Makes the texts, rows and runs that the command lines name."""
    with locked(world.root / "wrong") as new:
        if new:
            table.make(world.root / "wrong")


def listed(world: World, seed: int) -> Iterator[str]:
    for name, cases in CASES.items():
        yield from (f"wrong:{name}:{number}" for number, _ in enumerate(cases()))


def attempt(world: World, label: str, at: Path, seed: int) -> list[Failure]:
    """A command line in a copy of the folder, in which it may change nothing."""
    _, name, number = label.split(":")
    tree = shutil.copytree(world.root / "wrong", at / "tree", symlinks=True)
    os.chdir(tree)  # which some of the command lines name in full
    case, before = list(CASES[name]())[int(number)], names_in(tree)
    if name == "scripts":
        answer = table.process(case)
    else:
        finished = run([*case.words[0].split(), *case.words[1:]], tree)
        answer = table.Answer(finished.code, finished.out, finished.err, finished.cpu)
    left = sorted(names_in(tree) - before)
    found = [(LEFTOVER, f"leaves {', '.join(left[:3])}")] if left else []
    for fault in table.faults(case, answer):
        found.append((next((kind for start, kind in CLASSES.items() if fault.startswith(start)), UNCLEAR), fault))
    return [Failure(kind, f"{fault}: {case.name[:300]}: {answer.err[-200:]!r}") for kind, fault in found]
