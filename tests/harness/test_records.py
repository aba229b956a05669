"""Committed records that are altered in hundreds of ways: each is refused, or says what it said before."""

import random
import re
from collections import Counter

import pytest

from tests.conftest import ROOT
from utils.documents import Damaged
from utils.errors import UserError
from utils.reporting.records import read_record

RECORDS = sorted(path for path in (ROOT / "results").glob("*/*/*.json") if path.parent.parent.name != "benchmarks")
TRIES = 90  # of each kind


def flip(text: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(text))
    return text[:place] + bytes([text[place] ^ 1 << draw.randrange(8)]) + text[place + 1 :]


def truncate(text: bytes, draw: random.Random) -> bytes:
    return text[: draw.randrange(len(text))]


def delete_line(text: bytes, draw: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    del lines[draw.randrange(len(lines))]
    return b"".join(lines)


def change_digit(text: bytes, draw: random.Random) -> bytes:
    place = draw.choice([match.start() for match in re.finditer(rb"\d", text)])
    return text[:place] + str((int(text[place : place + 1]) + draw.randrange(1, 10)) % 10).encode() + text[place + 1 :]


def swap_lines(text: bytes, draw: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def checksum_of_another(text: bytes, draw: random.Random) -> bytes:
    mark = re.compile(rb'"sha256": "[0-9a-f]{64}"\n}')
    return mark.sub(mark.search(draw.choice(RECORDS).read_bytes())[0], text)


@pytest.mark.parametrize("alter", [flip, truncate, delete_line, change_digit, swap_lines, checksum_of_another])
def test_an_altered_record_is_refused_or_says_the_same(alter, tmp_path):
    draw, path, answers = random.Random(alter.__name__), tmp_path / "result.json", Counter()
    for _ in range(TRIES):
        original = draw.choice(RECORDS)
        path.write_bytes(alter(original.read_bytes(), draw))
        try:
            assert list(read_record(path).items()) == list(read_record(original).items())
            answers["the same"] += 1
        except UserError as error:
            assert isinstance(error, Damaged) and str(error).startswith(str(path)) and "\n" not in str(error)
            answers["refused"] += 1
    assert answers["refused"] > 0.9 * TRIES, answers
