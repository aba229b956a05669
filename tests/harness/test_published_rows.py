"""Reading the published rows of the five tasks with utils/data/rows.py; skipped where they are not there."""

from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.harness.test_examples import FOLDS, TITLES, refused, remedy
from utils.data.rows import Choice, Examples, Problem, kind_of, read_examples

DATA = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT) / "data"
PLACES = {"sst2": "glue/SST-2", "csqa": "csqa", "asdiv_a": "math/asdiv-a", "mawps": "math/mawps", "svamp": "math/svamp"}


def real(task: str) -> Path:
    if not (DATA / PLACES[task]).is_dir():
        pytest.skip(f"{DATA / PLACES[task]} is not there")
    return DATA / PLACES[task]


@cache
def published(task: str, fold: int = 0) -> Examples:
    return read_examples(task, real(task), fold)


NOTES = {
    ("asdiv_a", 3): (0, 1, 237),
    ("mawps", 0): (128, 3, 384),
    ("mawps", 1): (110, 3, 384),
    ("mawps", 2): (112, 1, 384),
    ("mawps", 3): (118, 3, 384),
    ("mawps", 4): (114, 4, 384),
}


@pytest.mark.parametrize(("task", "fold"), FOLDS)
def test_the_published_data_is_read_whole(task, fold):
    found = published(task, fold)
    assert found.title == TITLES[task]
    rows = {"sst2": (67_349, 872), "csqa": (9_741, 1_221), "mawps": (1_537, 384), "svamp": (3_138, 1_000)}
    rows["asdiv_a"] = [(979, 238), (979, 238), (979, 238), (980, 237), (951, 266)][fold]
    assert (len(found.train), len(found.held_out)) == rows[task]
    repeated, missed, of_all = NOTES.get((task, fold), (0, 0, 0))
    notes = [f"{repeated} of {of_all} dev rows have a question that is in train too"] if repeated else []
    notes += [f"{missed} of {of_all} dev rows have an equation that does not give the answer"] if missed else []
    assert found.notes == "; ".join(notes)


def test_published_rows():
    asked = "gino has number0 popsicle sticks . i have number1 popsicle sticks . what is the sum of our popsicle sticks ?"
    assert published("asdiv_a").train[0] == Problem(asked, (63.0, 50.0), "+ number0 number1", 113.0)
    found = published("sst2")
    assert found.train[0] == Choice((("hide new secretions from the parental units ",),), 0)
    assert [sum(row.label for row in rows) for rows in (found.train, found.held_out)] == [37_569, 444]
    found = published("csqa")
    assert [[row.label for row in found.held_out].count(label) for label in range(5)] == [239, 255, 241, 251, 235]
    assert all(len(row.sequences) == 5 and len({pair[0] for pair in row.sequences}) == 1 for row in found.train)


def test_the_published_test_files_are_refused_in_place_of_dev(tmp_path):
    for task, test, said in (
        ("sst2", "test.tsv", "line 1: the columns are 'index, sentence' (a test file without labels?), expected sentence, label"),
        ("csqa", "test_rand_split_no_answers.jsonl", "line 1, answerKey: the answer is missing; the published test file has no answers"),
    ):
        train, dev = kind_of(task).files(0)
        (tmp_path / train).symlink_to(real(task) / train)
        (tmp_path / dev).symlink_to(real(task) / test)
        assert refused(task, tmp_path) == f"{tmp_path / dev}, {said}{remedy(task)}"
