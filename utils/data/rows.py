"""Labelled rows for fine-tuning: SST-2, CommonsenseQA and three sets of mathematical word problems. Imports no torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

from utils.data.equations import solves, value
from utils.errors import UserError

LETTERS = ("A", "B", "C", "D", "E")
SHOWN = 80  # characters of a value in a refusal


class Choice(NamedTuple):
    """A row of a task of classes or choices. sequences: one of one text, or (question, choice) for each choice. label: class or choice."""

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
    """A folder's rows, all of them checked. title: as tables say it, with the numbers of rows where they are not the published ones.

    split: what `held_out` is, "dev" or "test". labels: how many classes or choices, 0 for problems. notes: what of the data limits what a
    quality on it says, or "". fingerprint: sha256, in hex, over the hashes of both files.
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


class Kind(NamedTuple):
    """What a task's files are. counts: the published rows of the train and of the held-out file, of each fold."""

    title: str
    names: tuple[str, str]
    counts: tuple[tuple[int, int], ...]
    rows: Callable[[_File], Iterator[Choice | Problem]]
    labels: int = 0
    split: str = "dev"

    @property
    def folds(self) -> int:
        """1 where the task has no folds."""
        return len(self.counts)

    def files(self, fold: int) -> list[str]:
        """Where the train and the held-out file are in a folder."""
        return [f"fold{fold}/{name}" if self.folds > 1 else name for name in self.names]


@dataclass(frozen=True)
class _File:
    """A file, read once, so that what is hashed is what is parsed. trains: it is the train file."""

    path: Path
    task: str
    trains: bool
    content: bytes

    def refuse(self, place: str, fault: str) -> NoReturn:
        where = f"{self.path}, {place}:" if place else f"{self.path}"
        raise UserError(f"{where} {fault}; {_remedy(self.task)}")

    @cached_property
    def text(self) -> str:
        """UserError where it is not UTF-8 or there is none."""
        try:
            text = self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self.content.count(b"\n", 0, error.start) + 1
            self.refuse(f"line {line}", f"the byte 0x{self.content[error.start]:02x} is not UTF-8")
        if not text.strip():
            self.refuse("", "is empty")
        return text


def _remedy(task: str) -> str:
    return f"mend it, or prepare the files again with `python data/prepare_task.py {task} --force`"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# rows of one file


def _table(file: _File, columns: tuple[str, ...], **how: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row by its columns, and the line where it ends. UserError for damaged quotes, and rows or a header of other columns."""
    reader, start = csv.reader(io.StringIO(file.text, newline=""), strict=True, **how), 1
    try:
        header = next(reader)
        if lacking := [name for name in columns if header.count(name) != 1]:
            test = " (a test file without labels?)" if lacking == ["label"] else ""
            file.refuse("line 1", f"the columns are {_shown(', '.join(header))}{test}, wanted are {', '.join(columns)}")
        start = reader.line_num + 1
        for row in reader:
            if len(row) != len(header):
                file.refuse(f"line {reader.line_num}", f"the row has {len(row)} columns, the header {len(header)}")
            yield reader.line_num, dict(zip(header, row, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:  # an open quote is found at the end of the file only: the row's first line tells more
        file.refuse(f"line {start}", f"the row cannot be read ({error})")


def _sst2(file: _File) -> Iterator[Choice]:
    for line, row in _table(file, ("sentence", "label"), delimiter="\t", quoting=csv.QUOTE_NONE):  # quotes are text here
        label = row["label"]
        if not row["sentence"].strip():
            file.refuse(f"line {line}, column sentence", f"{_shown(row['sentence'])} is no text")
        if label not in ("0", "1"):
            fault = "the label is missing" if not label.strip() else f"{_shown(label)} is neither 0 nor 1"
            file.refuse(f"line {line}, column label", fault + (", it marks a test file without labels" if label == "-1" else ""))
        yield Choice(((row["sentence"],),), int(label))


def _csqa(file: _File) -> Iterator[Choice]:
    for line, text in enumerate(file.text.removesuffix("\n").split("\n"), 1):  # splitlines would split at more than newlines
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            file.refuse(f"line {line}, column {error.colno}", f"not JSON ({error.msg})")
        except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
            file.refuse(f"line {line}", f"not JSON ({error})")
        yield _question(file, f"line {line}", row)


def _question(file: _File, line: str, row: Any) -> Choice:
    def text(entry: dict, key: str, column: str) -> str:
        found = entry.get(key)
        if not isinstance(found, str) or not found.strip():
            file.refuse(f"{line}, {column}", f"{_shown(found)} is no text")
        return found

    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, dict):
        file.refuse(f"{line}, question", f"{_shown(row)} has no question with its stem and choices")
    stem, choices = text(question, "stem", "question.stem"), question.get("choices")
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        there = f"{len(choices)} choices" if isinstance(choices, list) else _shown(choices)
        file.refuse(f"{line}, question.choices", f"{there}, where {len(LETTERS)} choices are wanted")
    labels = tuple(choice.get("label") if isinstance(choice, dict) else choice for choice in choices)
    if labels != LETTERS:
        file.refuse(f"{line}, question.choices", f"the labels are {_shown(labels)}, not {', '.join(LETTERS)}")
    sequences = tuple((stem, text(choice, "text", f"text of choice {letter}")) for letter, choice in zip(LETTERS, choices, strict=True))
    key = row.get("answerKey")
    if key in (None, ""):
        file.refuse(f"{line}, answerKey", "the answer is missing, as in the test file, which has no answers")
    if key not in LETTERS:
        file.refuse(f"{line}, answerKey", f"{_shown(key)} is none of {', '.join(LETTERS)}")
    return Choice(sequences, LETTERS.index(key))


def _problems(file: _File) -> Iterator[Problem]:
    for line, row in _table(file, ("Question", "Numbers", "Equation", "Answer")):
        if not row["Question"].strip():
            file.refuse(f"line {line}, column Question", f"{_shown(row['Question'])} is no text")
        numbers = tuple(_number(file, f"line {line}, column Numbers", word) for word in row["Numbers"].split())
        answer = _number(file, f"line {line}, column Answer", row["Answer"])
        if file.trains and value(row["Equation"], numbers) is None:
            slots = ", ".join(f"number{i}" for i in range(len(numbers))) or "no number"
            file.refuse(f"line {line}, column Equation", f"{_shown(row['Equation'])} has no value with {slots}")
        yield Problem(row["Question"], numbers, row["Equation"], answer)


def _number(file: _File, place: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in word:  # 1_000 is a number to Python only
        file.refuse(place, f"{_shown(word)} is not a number")
    return number


FIVE_OF_MAWPS = ((1_537, 384),) * 5
FIVE_OF_ASDIV = ((979, 238), (979, 238), (979, 238), (980, 237), (951, 266))

KINDS = {
    "sst2": Kind("SST-2", ("train.tsv", "dev.tsv"), ((67_349, 872),), _sst2, labels=2),
    "csqa": Kind("CommonsenseQA", ("train_rand_split.jsonl", "dev_rand_split.jsonl"), ((9_741, 1_221),), _csqa, labels=len(LETTERS)),
    "asdiv_a": Kind("ASDiv-A", ("train.csv", "dev.csv"), FIVE_OF_ASDIV, _problems),
    "mawps": Kind("MAWPS", ("train.csv", "dev.csv"), FIVE_OF_MAWPS, _problems),
    "svamp": Kind("SVAMP", ("train.csv", "dev.csv"), ((3_138, 1_000),), _problems, split="test"),  # its dev.csv is the test set
}
TASKS = tuple(KINDS)


# a folder


def kind_of(task: str) -> Kind:
    """The task's files. UserError for a task that is not one of TASKS."""
    if task not in KINDS:
        raise UserError(f"the task {task!r} is not one of {', '.join(TASKS)}")
    return KINDS[task]


def read_examples(task: str, folder: Path, fold: int = 0) -> Examples:
    """Every row of the task's two files in `folder`, once all of them are checked. Texts are as in the file: SST-2's end with a blank.

    Raises UserError, with the remedy, for an unknown task or fold, for a file that is missing or damaged, for the first row that is none of
    the task, with its line and column, and for files that have been mixed up.
    """
    kind, folder = kind_of(task), Path(folder)
    if fold not in range(kind.folds):
        there = f"has the folds 0 to {kind.folds - 1}" if kind.folds > 1 else "has no folds, leave it out"
        raise UserError(f"--fold {fold}: {kind.title} {there}")
    files = [_read(task, folder, name, trains=index == 0) for index, name in enumerate(kind.files(fold))]
    train, held_out = (_rows(kind, file) for file in files)
    if train == held_out:
        raise UserError(f"{files[0].path} and {files[1].path.name} hold the same rows; {_remedy(task)}")
    if len(train) < len(held_out):
        sizes = f"has {len(train):,} rows, fewer than {files[1].path.name} with {len(held_out):,}"
        raise UserError(f"{files[0].path} {sizes}: their names may have been swapped; {_remedy(task)}")
    fingerprint = hashlib.sha256("".join(hashlib.sha256(file.content).hexdigest() for file in files).encode()).hexdigest()
    title, notes = _title(kind, fold, len(train), len(held_out)), _notes(kind, train, held_out)
    return Examples(folder, task, title, train, held_out, kind.split, kind.labels, notes, fingerprint)


def _read(task: str, folder: Path, name: str, trains: bool) -> _File:
    path = folder / name
    try:
        return _File(path, task, trains, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        fault = f"{path} is missing" if folder.is_dir() else f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}"
        remedy = f"prepare it with `python data/prepare_task.py {task}`, or name another folder with --data DIR"
        raise UserError(f"{fault}: {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another folder with --data DIR") from None


def _rows(kind: Kind, file: _File) -> list:
    rows = list(kind.rows(file))
    if not rows:
        file.refuse("", "has a header and no rows")
    return rows


def _title(kind: Kind, fold: int, train: int, held_out: int) -> str:
    """A part of a set is never called by the set's name alone."""
    published = kind.counts[fold]
    if (train, held_out) == published:
        return kind.title
    return f"{kind.title} ({train:,} train rows, {held_out:,} {kind.split} rows; published {published[0]:,} and {published[1]:,})"


def _notes(kind: Kind, train: list, held_out: list) -> str:
    """Held-out rows that say little of what was learnt: those seen in training, and those whose own equation misses the answer."""
    seen = {row[0] for row in train}
    repeated, of_all = sum(row[0] in seen for row in held_out), f"of {len(held_out):,} {kind.split} rows"
    missed = sum(isinstance(row, Problem) and not solves(row.equation, row.numbers, row.answer) for row in held_out)
    notes = [f"{repeated:,} {of_all} have a question that is in train too"] if repeated else []
    return "; ".join(notes + ([f"{missed:,} {of_all} have an equation that does not give the answer"] if missed else []))
