"""Three sets of mathematical word problems, as prepared by arkilpatel/SVAMP: ASDiv-A, MAWPS and SVAMP. Imports no torch."""

import math
from collections.abc import Iterator

from utils.data.equations import value
from utils.data.rows import File, Kind, Problem, shown, table


def problems(file: File) -> Iterator[Problem]:
    """The rows of a CSV file."""
    for line, row in table(file, ("Question", "Numbers", "Equation", "Answer")):
        if not row["Question"].strip():
            file.refuse(f"line {line}, column Question", f"{shown(row['Question'])} is not text")
        numbers = tuple(_number(file, f"line {line}, column Numbers", word) for word in row["Numbers"].split())
        answer = _number(file, f"line {line}, column Answer", row["Answer"])
        if file.trains and value(row["Equation"], numbers) is None:
            slots = ", ".join(f"number{i}" for i in range(len(numbers))) or "no number"
            file.refuse(f"line {line}, column Equation", f"{shown(row['Equation'])} has no value with {slots}")
        yield Problem(row["Question"], numbers, row["Equation"], answer)


def _number(file: File, place: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in word:  # float() accepts 1_000
        file.refuse(place, f"{shown(word)} is not a number")
    return number


NAMES, TASK = ("train.csv", "dev.csv"), "utils.tasks.word_problems:word_problems"
ASDIV_A_FOLDS = ((979, 238), (979, 238), (979, 238), (980, 237), (951, 266))

ASDIV_A = Kind("ASDiv-A", NAMES, ASDIV_A_FOLDS, problems, task=TASK)
MAWPS = Kind("MAWPS", NAMES, ((1_537, 384),) * 5, problems, task=TASK)
SVAMP = Kind("SVAMP", NAMES, ((3_138, 1_000),), problems, split="test", task=TASK)  # its dev.csv is the test set
