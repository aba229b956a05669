"""Waiting times before training, in fresh processes: preparing a text, importing the library, the answer to a wrong flag."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Common, interleave, summarise

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "python -c pass"
LINE = b"%d. The quick brown fox jumps over the lazy dog, and %d others wait for their turn;\n"


@dataclass(frozen=True)
class DataFlags(Common):
    """Seconds of preparing a text, of importing the library and of refusing a wrong flag."""

    megabytes: float = 100.0
    """size of the text to prepare"""


def write_text(path: Path, size: int) -> None:
    """Writes a text of `size` bytes: one line repeated with increasing numbers."""
    count = 0
    with open(path, "wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(b"".join(LINE % (i, i * i % 97) for i in range(count, count + 1000))[:left])
            count += 1000


def process(*arguments: str, code: int = 0) -> Callable[[], None]:
    """Returns a function that runs Python with these arguments in the repository. RuntimeError unless it exits with `code`."""

    def call() -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != code:
            raise RuntimeError(f"python {' '.join(arguments)} exited with {done.returncode}, not {code}: {done.stderr[-500:]}")

    return call


def contestants(source: Path, out: Path, megabytes: float) -> dict[str, Callable[[], None]]:
    prepare = ("data/prepare.py", "benchmark", "--source", str(source), "--out", str(out), "--force")
    return {
        BASELINE: process("-c", "pass"),
        "import torch": process("-c", "import torch"),
        "import torch, smoe_dropout, and use it": process("-c", "import torch, smoe_dropout; smoe_dropout.moefy"),
        "train.py refuses a wrong flag": process("train.py", "--no_such_flag", code=2),
        f"data/prepare.py, {megabytes:g} MB": process(*prepare),
    }


def rows(flags: DataFlags) -> list[dict[str, Any]]:
    """One row, with a result for each process."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text"
        write_text(source, round(flags.megabytes * 1e6))
        seconds = interleave(contestants(source, Path(folder) / "prepared", flags.megabytes), flags.rounds)
    return [{"results": summarise(seconds, BASELINE)}]
