"""CommonsenseQA (Talmor et al. 2019): a question with five choices, one of them correct. Imports no torch."""

import re
from collections.abc import Iterator
from typing import Any

from smoe_dropout.files import parse_json
from smoe_dropout.options import ConfigError
from utils.data.rows import Choice, File, Kind, shown

HALF_LETTER = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which JSON can write and UTF-8 cannot
LETTERS = ("A", "B", "C", "D", "E")


def questions(file: File) -> Iterator[Choice]:
    """The rows of a JSON Lines file."""
    for line, text in enumerate(file.text.removesuffix("\n").split("\n"), 1):  # splitlines() would also split at other characters
        try:
            row = parse_json(text, f"line {line}")
        except ConfigError as error:
            file.refuse(f"line {line}", str(error).removeprefix(f"line {line} ").replace("line 1 column", "column"))
        yield _question(file, f"line {line}", row)


def _question(file: File, line: str, row: Any) -> Choice:
    def text(entry: dict, key: str, column: str) -> str:
        found = entry.get(key)
        if not isinstance(found, str) or not found.strip() or HALF_LETTER.search(found):
            file.refuse(f"{line}, {column}", f"{shown(found)} is not text")
        return found

    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, dict):
        file.refuse(f"{line}, question", f"{shown(row)} has no question with its stem and choices")
    stem, choices = text(question, "stem", "question.stem"), question.get("choices")
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        found = f"{len(choices)} choices" if isinstance(choices, list) else shown(choices)
        file.refuse(f"{line}, question.choices", f"{found}, expected {len(LETTERS)} choices")
    labels = tuple(choice.get("label") if isinstance(choice, dict) else choice for choice in choices)
    if labels != LETTERS:
        file.refuse(f"{line}, question.choices", f"the labels are {shown(labels)}, not {', '.join(LETTERS)}")
    sequences = tuple((stem, text(choice, "text", f"text of choice {letter}")) for letter, choice in zip(LETTERS, choices, strict=True))
    key = row.get("answerKey")
    if key in (None, ""):
        file.refuse(f"{line}, answerKey", "the answer is missing; the published test file has no answers")
    if key not in LETTERS:
        file.refuse(f"{line}, answerKey", f"{shown(key)} is not one of {', '.join(LETTERS)}")
    return Choice(sequences, LETTERS.index(key))


COMMONSENSE_QA = Kind(
    "CommonsenseQA", ("train_rand_split.jsonl", "dev_rand_split.jsonl"), ((9_741, 1_221),), questions, labels=len(LETTERS)
)
