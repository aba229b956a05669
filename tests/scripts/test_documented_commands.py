"""Commands on the documentation pages: programs, scripts, flags and environment variables exist, and training commands parse."""

import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.conftest import ROOT
from tests.scripts.test_scripts import PAPER_ROWS, command_of
from utils.cli.train import parse
from utils.flags.models import presets_of

PAGES = sorted({*ROOT.glob("*.md"), *(path for folder in ("docs", "data", "results") for path in (ROOT / folder).rglob("*.md"))})
PAGES.remove(ROOT / "CHANGELOG.md")  # it names what is gone
COMMAND = re.compile(r"(?:[A-Z_]+=(?:\"[^\"]*\"|[^\s$]*) )*(?:bash script/|python |torchrun |accelerate launch )\S.*")
PROGRAM_OF = {
    "table1": "train.py",
    "figure5": "train.py",
    "wikitext103": "train.py",
    "text8": "train.py",
    "ablation": "train.py",
    "table2": "finetune.py",
    "quickstart.sh": "train.py",
}
PROGRAM_OF["vision"] = "benchmarks.vision"
SKIPPED = {"torchrun", "accelerate", "launch", "--nproc_per_node"}


class Command(NamedTuple):
    """A command line, split: environment variables, the script or program (a module with dots), and its arguments."""

    line: str
    variables: list[str]
    program: str
    arguments: list[str]


def commands_of(page: Path) -> list[Command]:
    """From the page's shell blocks and inline code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    found = []
    for line in lines:
        if match := COMMAND.search(line.split("$(")[-1].split(")")[0] if "$(" in line else line):
            words = [word for word in shlex.split(match[0].replace("[", "").replace("]", ""), comments=True)]
            variables = [word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
            words = [word for word in words[len(variables) :] if word not in SKIPPED and not (word.isdecimal() and "torchrun" in line)]
            words = words[1:] if words[0] in ("bash", "python") else words
            words = words[1:] if words[0] == "-m" else words
            if words[0] != "-c" and not words[0].startswith(("pip", "pytest")):
                found.append(Command(line, variables, words[0], words[1:]))
    return found


@cache
def help_of(program: str) -> str:
    name, *words = program.split()
    return tiny.completed([*words, "--help"], program=name if name.endswith(".py") else f"-m {name}").out


def known_flags(program: str) -> set[str]:
    """The flags that a program's --help lists, written with _."""
    return {flag.replace("-", "_") for flag in re.findall(r"--([a-zA-Z][\w-]*)", help_of(program))}


def programs_of(script: str) -> list[str]:
    """The programs whose flags a script takes."""
    folder = script.split("/")[1]
    return ["train.py", "finetune.py"] if folder == "surgery" else [PROGRAM_OF[folder]] if folder in PROGRAM_OF else []


ALL = [(page, command) for page in PAGES for command in commands_of(page)]


def test_pages_have_commands():
    pages = {page.name for page, _ in ALL}
    assert sum(trains(page, command) for page, command in ALL) > 10
    assert pages >= {"experiments.md", "surgery.md"} and len(ALL) > 50


@pytest.mark.parametrize(("page", "command"), ALL, ids=lambda value: value.name if isinstance(value, Path) else value.line.strip()[:60])
def test_command_is_one_that_exists(page, command):
    is_script = command.program.startswith("script/")
    if is_script or command.program.endswith(".py"):
        assert (ROOT / command.program).is_file(), command.line
    else:
        assert importlib.util.find_spec(command.program), command.line
    programs = programs_of(command.program) if is_script else [command.program]
    if command.program == "benchmarks" and command.arguments[:1] and command.arguments[0].isalpha():
        assert command.arguments[0] in re.findall(r"• (\w+)", help_of("benchmarks")), command.line
        programs = [f"benchmarks {command.arguments[0]}"]
    flags = [word[2:].partition("=")[0].removeprefix("no-").replace("-", "_") for word in command.arguments if word.startswith("--")]
    known = set().union({"help"}, *(known_flags(program) for program in programs))
    assert set(flags) <= known, f"{page}: {command.line}"
    if is_script:
        readers = [command.program, "script/common.sh", *(["tests/conftest.py"] if command.program == "script/test.sh" else [])]
        text = "".join((ROOT / reader).read_text() for reader in readers)
        assert all(f"${{{variable}" in text or f'"{variable}"' in text for variable in command.variables), command.line


def trains(page: Path, command: Command) -> bool:
    """Return whether it trains from random weights, without a folder or a router of the reader's own."""
    folders = ("--eval_only", "--start_from", "--settings_from")
    theirs = page.name == "plug_in.md" or any(word in folders or re.fullmatch(r"[A-Z_]{2,}", word) for word in command.arguments)
    return not theirs and bool(re.match(r"script/(table1|figure5)/(?!run_all)|train.py|utils.cli.train", command.program))


@pytest.mark.parametrize("command", [each for page, each in ALL if trains(page, each)], ids=lambda command: command.line.strip()[:60])
def test_training_command_parses(command):
    script = command.program if command.program.startswith("script/") else None
    flags = parse([*(command_of(ROOT / script) if script else []), *command.arguments])[0]
    assert flags.work_dir.startswith("runs/")


def test_experiments_name_every_script_of_table1():
    text = (ROOT / "docs" / "experiments.md").read_text()
    rows = {path.name for path in (ROOT / "script" / "table1").glob("*.sh") if path.name != "run_all.sh"}
    assert rows == set(re.findall(r"`(\w+\.sh)`", text.split("## Presets")[0])) and {f"{row}.sh" for row in PAPER_ROWS} <= rows


@pytest.mark.parametrize("preset", ["paper", "laptop", "replica", "quick"])
def test_experiments_state_the_presets(preset):
    text = (ROOT / "docs" / "experiments.md").read_text()
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| `{preset}`")]
    for cell, model in zip(row[1:3], ("transformer_xl", "bert"), strict=True):
        assert (cell == "–") == (preset not in presets_of(model))
        if cell == "–":
            continue
        flags = parse(["--model", model, "--preset", preset])[0]
        for stated in (f"{flags.max_step:,} steps", f"batch {flags.batch_size} x {flags.tgt_len}"):
            assert stated in cell
        assert ("bf16" in cell) == (flags.precision == "bf16" and preset in ("laptop", "replica"))
