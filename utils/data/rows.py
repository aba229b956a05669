"""Labelled rows for fine-tuning, and the registry of fine-tuning tasks. Imports no torch.

Adding a task: a file with its `Kind`, and a line in TASKS. Its own presets, if any, go to utils/flags/presets.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

from smoe_dropout.registry import load
from utils import documents
from utils.data.equations import solves
from utils.data.meta import ROWS, RowsMeta
from utils.errors import UserError

TASKS: dict[str, str] = {
    "sst2": "utils.data.sst2:SST2",
    "csqa": "utils.data.commonsense_qa:COMMONSENSE_QA",
    "asdiv_a": "utils.data.problem_sets:ASDIV_A",
    "mawps": "utils.data.problem_sets:MAWPS",
    "svamp": "utils.data.problem_sets:SVAMP",
}
SHOWN = 80  # longest value quoted in an error message, in characters
LARGEST = 256 << 20  # bytes of a file; the largest published one has 3.8 MB


class Choice(NamedTuple):
    """A row with classes or choices. sequences: one of one text, or (question, choice) for each choice. label: index of class or choice."""

    sequences: tuple[tuple[str, ...], ...]
    label: int


class Problem(NamedTuple):
    """A mathematical word problem. The question has number0, number1, ... where `numbers` stood; equation: as in utils.data.equations."""

    question: str
    numbers: tuple[float, ...]
    equation: str
    answer: float


@dataclass(frozen=True)
class Examples:
    """The rows of a folder, all checked. title: as tables show it, with the numbers of rows where they differ from the published ones.

    split: name of the held-out rows, "dev" or "test". labels: number of classes or choices, 0 for word problems. notes: limits of what a
    score on these rows means, or "". fingerprint: sha256, in hex, over the hashes of both files.
    """

    path: Path
    name: str
    title: str
    train: list
    held_out: list
    split: str
    labels: int
    notes: str
    fingerprint: str
    unit: ClassVar[str] = "rows"
    vocabulary: ClassVar[None] = None

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each split."""
        return {"train": len(self.train), self.split: len(self.held_out)}


class Kind(NamedTuple):
    """A fine-tuning task: its files and how they are read.

    names: the train and the held-out file. counts: their published numbers of rows, for each fold. rows: reads one file; a row is a tuple
    whose first element is its text. labels: classes or choices, 0 for none. task: place of its Task, called as
    task(flags, examples, engine, encoder).
    """

    title: str
    names: tuple[str, str]
    counts: tuple[tuple[int, int], ...]
    rows: Callable[[File], Iterator[tuple]]
    labels: int = 0
    split: str = "dev"
    task: str = "utils.tasks.choice:AnswerChoice"

    @property
    def folds(self) -> int:
        """Number of folds, 1 for a task without them."""
        return len(self.counts)

    def files(self, fold: int) -> list[str]:
        """Paths of the train and the held-out file inside the task's folder."""
        return [f"fold{fold}/{name}" if self.folds > 1 else name for name in self.names]


@dataclass(frozen=True)
class File:
    """A file, read once, so that the hashed bytes are the parsed bytes. trains: whether it is the train file."""

    path: Path
    task: str
    trains: bool
    content: bytes

    def refuse(self, place: str, fault: str) -> NoReturn:
        """Raises the UserError for a fault at a place in the file."""
        where = f"{self.path}, {place}:" if place else f"{self.path}"
        raise UserError(f"{where} {fault}; {_remedy(self.task)}")

    @cached_property
    def text(self) -> str:
        """The decoded content. UserError if it is empty or not UTF-8."""
        try:
            text = self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self.content.count(b"\n", 0, error.start) + 1
            self.refuse(f"line {line}", f"the byte 0x{self.content[error.start]:02x} is not UTF-8")
        if "\0" in text:
            self.refuse(f"line {text.count(chr(10), 0, text.index(chr(0))) + 1}", "a NUL byte is not text")
        if not text.strip():
            self.refuse("", "is empty")
        return text


def table(file: File, columns: tuple[str, ...], **dialect: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields each row of a CSV file by column, with the line it ends on. UserError for broken quoting and for other columns."""
    reader, start = csv.reader(io.StringIO(file.text, newline=""), strict=True, **dialect), 1
    try:
        header = next(reader)
        if lacking := [name for name in columns if header.count(name) != 1]:
            test = " (a test file without labels?)" if lacking == ["label"] else ""
            file.refuse("line 1", f"the columns are {shown(', '.join(header))}{test}, expected {', '.join(columns)}")
        start = reader.line_num + 1
        for row in reader:
            if len(row) != len(header):
                file.refuse(f"line {reader.line_num}", f"the row has {len(row)} columns, the header {len(header)}")
            yield reader.line_num, dict(zip(header, row, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:  # an open quote is found only at the end of the file: the row's first line says more
        file.refuse(f"line {start}", f"the row cannot be read ({error})")


def shown(value: object) -> str:
    """A value as error messages quote it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _remedy(task: str) -> str:
    return f"fix it, or prepare the files again with `python data/prepare_task.py {task} --force`"


def kind_of(task: str) -> Kind:
    """The registered task of that name. UserError if there is none."""
    if task not in TASKS:
        raise UserError(f"the task {task!r} is not one of {', '.join(TASKS)}")
    return load(TASKS, "task", task)


def read_examples(task: str, folder: Path, fold: int = 0) -> Examples:
    """Reads and checks every row of the task's two files in `folder`. Texts are as in the file: those of SST-2 end in a space.

    Raises UserError, with the remedy, for an unknown task or fold, a file that is missing or damaged, the first invalid row, with its line
    and column, and files that have been swapped.
    """
    kind, folder = kind_of(task), Path(folder)
    if fold not in range(kind.folds):
        folds = f"has the folds 0 to {kind.folds - 1}" if kind.folds > 1 else "has no folds, leave it out"
        raise UserError(f"--fold {fold}: {kind.title} {folds}")
    files = [_read(task, folder, name, trains=index == 0) for index, name in enumerate(kind.files(fold))]
    train, held_out = (list(kind.rows(file)) for file in files)
    for file, rows in zip(files, (train, held_out), strict=True):
        if not rows:
            file.refuse("", "has a header and no rows")
    if train == held_out:
        raise UserError(f"{files[0].path} and {files[1].path.name} hold the same rows; {_remedy(task)}")
    if len(train) < len(held_out):
        sizes = f"has {len(train):,} rows, fewer than {files[1].path.name} with {len(held_out):,}"
        raise UserError(f"{files[0].path} {sizes}: their names may have been swapped; {_remedy(task)}")
    digests = [hashlib.sha256(file.content).hexdigest() for file in files]
    refuse_changed(task, folder, dict(zip(kind.files(fold), digests, strict=True)))
    fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
    title, notes = _title(kind, fold, len(train), len(held_out)), _notes(kind, train, held_out)
    return Examples(folder, task, title, train, held_out, kind.split, kind.labels, notes, fingerprint)


def refuse_changed(task: str, folder: Path, digests: dict[str, str]) -> None:
    """Raise UserError if the folder has a record, as prepare_task.py writes it, of other files; one brought by hand needs none."""
    path = folder / ROWS
    if path.exists():
        remedy = f"prepare the files again with `python data/prepare_task.py {task} --force`, or remove {path.name} if they are your own"
        recorded = documents.read(path, RowsMeta, remedy)
        if recorded["task"] != task:
            raise documents.Damaged(path, f"is of the task {recorded['task']}, not {task}", remedy)
        for name, sha256 in digests.items():
            if recorded["files"].get(name, {}).get("sha256") != sha256:
                raise documents.Damaged(folder / name, f"is not the file that {path.name} records", remedy)


def _read(task: str, folder: Path, name: str, trains: bool) -> File:
    path = folder / name
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MB, too large for labelled rows: name another folder with --data DIR")
        return File(path, task, trains, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        no_folder = "is a file, not a folder" if folder.exists() else "does not exist"
        fault = f"{path} is missing" if folder.is_dir() else f"{folder} {no_folder}"
        remedy = f"prepare it with `python data/prepare_task.py {task}`, or name another folder with --data DIR"
        raise UserError(f"{fault}: {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another folder with --data DIR") from None


def _title(kind: Kind, fold: int, train: int, held_out: int) -> str:
    """The task's title, with the numbers of rows if incomplete, so a subset is never labelled as the full set."""
    published = kind.counts[fold]
    if (train, held_out) == published:
        return kind.title
    return f"{kind.title} ({train:,} train rows, {held_out:,} {kind.split} rows; published {published[0]:,} and {published[1]:,})"


def _notes(kind: Kind, train: list, held_out: list) -> str:
    """Counts held-out rows that do not measure generalisation: those seen in training, and those whose equation misses the answer."""
    seen = {row[0] for row in train}
    repeated, of_all = sum(row[0] in seen for row in held_out), f"of {len(held_out):,} {kind.split} rows"
    missed = sum(isinstance(row, Problem) and not solves(row.equation, row.numbers, row.answer) for row in held_out)
    notes = [f"{repeated:,} {of_all} have a question that is in train too"] if repeated else []
    return "; ".join(notes + ([f"{missed:,} {of_all} have an equation that does not give the answer"] if missed else []))
