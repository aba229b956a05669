"""utils/data/rows.py: every row of the five tasks as in the files, and refusals with place and remedy."""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.data.rows import TASKS, Choice, Problem, kind_of, read_examples
from utils.errors import UserError

TITLES = {"sst2": "SST-2", "csqa": "CommonsenseQA", "asdiv_a": "ASDiv-A", "mawps": "MAWPS", "svamp": "SVAMP"}
FOLDS = [(task, fold) for task in TASKS for fold in range(kind_of(task).folds)]
COLUMNS = ("Question", "Numbers", "Equation", "Answer")


def question(number: int, **changes: object) -> str:
    """A line of CommonsenseQA; `changes` apply to the row or, for keys it does not have, to its question."""
    choices = [{"label": label, "text": f"{label.lower()}{number}"} for label in "ABCDE"]
    row = {"answerKey": "ABCDE"[number % 5], "id": f"id{number}", "question": {"question_concept": "concept"}}
    row["question"] |= {"choices": choices, "stem": f"What is {number}?"}
    for key, value in changes.items():
        (row if key in row else row["question"])[key] = value
    return json.dumps(row) + "\n"


def table(*rows: tuple, header: tuple[str, ...] = COLUMNS) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def problem(number: int) -> tuple[str, str, str, str]:
    return f"ann has number0 pens and {number} pots . she buys number1 .", f"{number} 2.5", "+ number0 number1", f"{number + 2.5}"


def contents(task: str) -> dict[str, str]:
    """Six rows to train on and four held out, of each fold."""
    if task == "sst2":
        files = ["sentence\tlabel\n" + "".join(f"film {n} \t{n % 2}\n" for n in some) for some in (range(6), range(6, 10))]
    elif task == "csqa":
        files = ["".join(map(question, some)) for some in (range(6), range(6, 10))]
    else:
        files = [table(*map(problem, some)) for some in (range(6), range(6, 10))]
    kind = kind_of(task)
    return {name: text for fold in range(kind.folds) for name, text in zip(kind.files(fold), files, strict=True)}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def refused(task: str, folder: Path, fold: int = 0) -> str:
    with pytest.raises(UserError) as error:
        read_examples(task, folder, fold)
    assert "\n" not in str(error.value)
    return str(error.value)


def remedy(task: str) -> str:
    return f"; fix it, or prepare the files again with `python data/prepare_task.py {task} --force`"


# what is read


def test_sst2_row(tmp_path):
    found = read_examples("sst2", write(tmp_path, contents("sst2")))
    assert found.train == [Choice(((f"film {n} ",),), n % 2) for n in range(6)]
    assert found.held_out == [Choice(((f"film {n} ",),), n % 2) for n in range(6, 10)]
    assert (found.path, found.name, found.split, found.labels, found.notes) == (tmp_path, "sst2", "dev", 2, "")
    assert (found.unit, found.vocabulary) == ("rows", None)


def test_a_question_with_each_of_its_choices(tmp_path):
    found = read_examples("csqa", write(tmp_path, contents("csqa")))
    wanted = [Choice(tuple((f"What is {n}?", f"{letter}{n}") for letter in "abcde"), n % 5) for n in range(10)]
    assert (found.train, found.held_out) == (wanted[:6], wanted[6:])
    assert (found.name, found.split, found.labels, found.notes) == ("csqa", "dev", 5, "")


@pytest.mark.parametrize(("task", "split"), [("asdiv_a", "dev"), ("mawps", "dev"), ("svamp", "test")])
def test_a_problem_with_its_equation(task, split, tmp_path):
    found = read_examples(task, write(tmp_path, contents(task)))
    wanted = [Problem(problem(n)[0], (float(n), 2.5), "+ number0 number1", n + 2.5) for n in range(10)]
    assert (found.train, found.held_out) == (wanted[:6], wanted[6:])
    assert (found.name, found.split, found.labels, found.notes) == (task, split, 0, "")
    assert all(type(number) is float for row in found.train for number in (*row.numbers, row.answer))


def test_each_fold_is_read_from_its_own_folder(tmp_path):
    files = contents("mawps") | {"fold3/train.csv": table(*map(problem, range(20, 26))), "fold3/dev.csv": table(problem(30))}
    write(tmp_path, files)
    found = read_examples("mawps", tmp_path, 3)
    assert [row.answer for row in found.train + found.held_out] == [22.5, 23.5, 24.5, 25.5, 26.5, 27.5, 32.5]
    assert found.title.startswith("MAWPS (") and read_examples("mawps", tmp_path, 4).train[0].answer == 2.5


def test_quotes_in_sentences_are_text(tmp_path):
    said = ['" oh " he said " ', '"whole" ', "it 's \\\" fine ", '"']
    rows = "".join(f"{text}\t1\n" for text in said)
    found = read_examples("sst2", write(tmp_path, contents("sst2") | {"train.tsv": f"sentence\tlabel\n{rows}"}))
    assert [row.sequences for row in found.train] == [((text,),) for text in said]


def test_quoted_fields_of_problems_may_hold_commas_quotes_and_newlines(tmp_path):
    asked = 'ann , who said " ten "\nhas number0 pens\r\nor so ?'
    rows = [("a b", "12.5 3", "- number0 * number1 2.0", "6.5", asked), ("c", "-4.0", "number0", "-4", "short ?")]
    files = {"train.csv": table(*rows, header=("Body", "Numbers", "Equation", "Answer", "Question"))}
    found = read_examples("svamp", write(tmp_path, contents("svamp") | files | {"dev.csv": table(problem(9))}))
    wanted = [Problem(asked, (12.5, 3.0), "- number0 * number1 2.0", 6.5), Problem("short ?", (-4.0,), "number0", -4.0)]
    assert found.train == wanted


@pytest.mark.parametrize("task", TASKS)
def test_files_saved_on_windows_are_the_same(task, tmp_path):
    found = read_examples(task, write(tmp_path / "a", contents(task)))
    files = {name: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for name, text in contents(task).items()}
    same = read_examples(task, write(tmp_path / "b", files))
    assert (same.train, same.held_out) == (found.train, found.held_out) and same.fingerprint != found.fingerprint


def test_rows_end_at_newlines_only(tmp_path):
    odd = "a\u2028b\x85c\x0bd\x0ce\x1cf "
    found = read_examples("sst2", write(tmp_path / "a", contents("sst2") | {"dev.tsv": f"sentence\tlabel\n{odd}\t1\n"}))
    assert found.held_out == [Choice(((odd,),), 1)]
    line = question(7, stem="X").replace("X", odd[:3])
    found = read_examples("csqa", write(tmp_path / "b", contents("csqa") | {"dev_rand_split.jsonl": line}))
    assert found.held_out[0].sequences[0] == (odd[:3], "a7")


@pytest.mark.parametrize("task", TASKS)
def test_a_last_line_without_newline_counts(task, tmp_path):
    write(tmp_path, {name: text.removesuffix("\n") for name, text in contents(task).items()})
    found = read_examples(task, tmp_path)
    assert (len(found.train), len(found.held_out)) == (6, 4)


# titles, notes, fingerprints


@pytest.mark.parametrize(("task", "fold"), FOLDS)
def test_only_the_published_numbers_of_rows_are_called_by_the_name(task, fold, tmp_path, monkeypatch):
    name = TITLES[task]
    kind = kind_of(task)
    train, held = kind.counts[fold]
    write(tmp_path, contents(task))
    split = "test" if task == "svamp" else "dev"
    wanted = f"{name} (6 train rows, 4 {split} rows; published {train:,} and {held:,})"
    assert read_examples(task, tmp_path, fold).title == wanted
    for counts, title in {(6, 4): name, (6, 5): None, (7, 4): None, (4, 6): None}.items():
        folds = list(kind.counts)
        folds[fold] = counts
        monkeypatch.setattr(TASKS[task].replace(":", "."), kind._replace(counts=tuple(folds)))
        found = read_examples(task, tmp_path, fold).title
        assert found == title if title else found == f"{name} (6 train rows, 4 {split} rows; published {counts[0]} and {counts[1]})"


def test_notes_on_leaked_questions_and_unsolvable_equations(tmp_path):
    row = problem(9)
    unsolved = [(row[0], "1", "+ number0 number1", "3"), (row[0], "1 2", "", "3"), (row[0], "3 10", "/ number1 number0", "3.333")]
    solved = [problem(1), ("a new one", "1 2", "- number0 number1", "-1.00009")]
    for task, split in (("mawps", "dev"), ("svamp", "test")):
        name = kind_of(task).files(0)[1]
        found = read_examples(task, write(tmp_path / task, contents(task) | {name: table(*unsolved, *solved)}))
        said = (
            f"1 of 5 {split} rows have a question that is in train too",
            f"3 of 5 {split} rows have an equation that does not give the answer",
        )
        assert found.notes == "; ".join(said) and found.held_out[1].equation == ""
    files = contents("csqa")
    files["dev_rand_split.jsonl"] += question(0, answerKey="B") + question(4, choices=[{"label": x, "text": x} for x in "ABCDE"])
    assert read_examples("csqa", write(tmp_path / "c", files)).notes == "1 of 6 dev rows have a question that is in train too"


@pytest.mark.parametrize("task", TASKS)
def test_the_fingerprint_is_of_the_bytes_of_both_files(task, tmp_path):
    names, found = kind_of(task).files(0), set()
    for index, name in enumerate([*names, None]):
        files = {name: text.encode() for name, text in contents(task).items()}
        if name:
            files[name] = b"\xef\xbb\xbf" + files[name]  # the same rows
        digests = "".join(hashlib.sha256(files[name]).hexdigest() for name in names)
        found.add(read_examples(task, write(tmp_path / str(index), files)).fingerprint)
        assert hashlib.sha256(digests.encode()).hexdigest() in found
    assert len(found) == 3


def test_a_row_that_moves_to_the_other_file_changes_the_fingerprint(tmp_path):
    lines = [question(n) for n in range(10)]
    found = set()
    for end in (6, 7):
        files = {"train_rand_split.jsonl": "".join(lines[:end]), "dev_rand_split.jsonl": "".join(lines[end:])}
        found.add(read_examples("csqa", write(tmp_path / str(end), files)).fingerprint)
    assert len(found) == 2


# refusals


SST2 = [
    ("the film \t2\n", "column label: '2' is neither 0 nor 1"),
    ("the film \tgood\n", "column label: 'good' is neither 0 nor 1"),
    ("the film \t1.0\n", "column label: '1.0' is neither 0 nor 1"),
    ("the film \t 1\n", "column label: ' 1' is neither 0 nor 1"),
    ("the film \t01\n", "column label: '01' is neither 0 nor 1"),
    ("the film \t\n", "column label: the label is missing"),
    ("the film \t-1\n", "column label: '-1' is neither 0 nor 1, it marks a test file without labels"),
    ("\t1\n", "column sentence: '' is not text"),
    ("  \t1\n", "column sentence: '  ' is not text"),
    ("the film\n", "the row has 1 columns, the header 2"),
    ("the\tfilm\t1\n", "the row has 3 columns, the header 2"),
    ("\n", "the row has 0 columns, the header 2"),
    (f"{'x' * 200_000}\t1\n", "the row cannot be read (field larger than field limit (131072))"),
    (f"the film\t{'x' * 90}\n", f"column label: '{'x' * 79}... is neither 0 nor 1"),
]


def place(line: int, said: str) -> str:
    return f"line {line}, {said}" if said.startswith(("column ", "question", "answerKey", "text ")) else f"line {line}: {said}"


@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
@pytest.mark.parametrize(("row", "said"), SST2, ids=lambda value: repr(value)[:40])
def test_invalid_sst2_row_is_refused(name, row, said, tmp_path):
    files = contents("sst2")
    lines = files[name].splitlines(keepends=True)
    files[name] = "".join([*lines[:3], row, *lines[3:]])
    assert refused("sst2", write(tmp_path, files)) == f"{tmp_path / name}, {place(4, said)}{remedy('sst2')}"


FOUR = [{"label": label, "text": label} for label in "ABCD"]
CSQA = [
    (question(9, answerKey="F"), "answerKey: 'F' is not one of A, B, C, D, E"),
    (question(9, answerKey="AB"), "answerKey: 'AB' is not one of A, B, C, D, E"),
    (question(9, answerKey=1), "answerKey: 1 is not one of A, B, C, D, E"),
    (question(9, answerKey=[1]), "answerKey: [1] is not one of A, B, C, D, E"),
    (question(9, answerKey=""), "answerKey: the answer is missing; the published test file has no answers"),
    (question(9).replace("answerKey", "key"), "answerKey: the answer is missing; the published test file has no answers"),
    (question(9, choices=FOUR), "question.choices: 4 choices, expected 5 choices"),
    (question(9, choices=[*FOUR, *FOUR[:2]]), "question.choices: 6 choices, expected 5 choices"),
    (question(9, choices=None), "question.choices: None, expected 5 choices"),
    (question(9, choices=[*FOUR, FOUR[0]]), "question.choices: the labels are ('A', 'B', 'C', 'D', 'A'), not A, B, C, D, E"),
    (question(9, choices=[*FOUR, {"text": "e"}]), "question.choices: the labels are ('A', 'B', 'C', 'D', None), not A, B, C, D, E"),
    (question(9, choices=list("12345")), "question.choices: the labels are ('1', '2', '3', '4', '5'), not A, B, C, D, E"),
    (question(9, choices=[*FOUR, {"label": "E", "text": " "}]), "text of choice E: ' ' is not text"),
    (question(9, choices=[*FOUR, {"label": "E"}]), "text of choice E: None is not text"),
    (question(9, stem=""), "question.stem: '' is not text"),
    (question(9, stem=["What?"]), "question.stem: ['What?'] is not text"),
    ('{"answerKey": "A"}\n', "question: {'answerKey': 'A'} has no question with its stem and choices"),
    ('{"question": "What?"}\n', "question: {'question': 'What?'} has no question with its stem and choices"),
    ("[1]\n", "question: [1] has no question with its stem and choices"),
    (question(9)[:50] + "\n", "is not readable as JSON (Unterminated string starting at: column 46 (char 45))"),
    (question(9)[:-1] + question(9), f"is not readable as JSON (Extra data: column {len(question(9))} (char {len(question(9)) - 1}))"),
    ("\n", "is not readable as JSON (Expecting value: column 1 (char 0))"),
]


@pytest.mark.parametrize("name", ["train_rand_split.jsonl", "dev_rand_split.jsonl"])
@pytest.mark.parametrize(("row", "said"), CSQA, ids=lambda value: repr(value)[:40])
def test_a_row_that_is_no_question_with_its_answer(name, row, said, tmp_path):
    files = contents("csqa")
    lines = files[name].splitlines(keepends=True)
    files[name] = "".join([*lines[:2], row, *lines[2:]])
    assert refused("csqa", write(tmp_path, files)) == f"{tmp_path / name}, {place(3, said)}{remedy('csqa')}"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[" * 200_000, "nested deeper than 64 levels"),
        ("1" * 5_000, "not readable as JSON (Exceeds"),
        (question(9, stem="\ud800").rstrip("\n"), "not readable as JSON ('utf-8'"),
    ],
    ids=["deep", "long", "half a pair"],
)
def test_json_that_python_gives_up_on(line, fault, tmp_path):
    said = refused("csqa", write(tmp_path, contents("csqa") | {"dev_rand_split.jsonl": question(7) + line}))
    assert said.startswith(f"{tmp_path / 'dev_rand_split.jsonl'}, line 2: is {fault}") and said.endswith(remedy("csqa"))


MATHS = [
    (("", "1 2", "+ number0 number1", "3"), "column Question: '' is not text"),
    (("how many ?", "1 two", "+ number0 number1", "3"), "column Numbers: 'two' is not a number"),
    (("how many ?", "1 nan", "number0", "3"), "column Numbers: 'nan' is not a number"),
    (("how many ?", "1 inf", "number0", "3"), "column Numbers: 'inf' is not a number"),
    (("how many ?", "1_000 2", "+ number0 number1", "1002"), "column Numbers: '1_000' is not a number"),
    (("how many ?", "1,2", "number0", "3"), "column Numbers: '1,2' is not a number"),
    (("how many ?", "1 2", "+ number0 number1", ""), "column Answer: '' is not a number"),
    (("how many ?", "1 2", "+ number0 number1", "three"), "column Answer: 'three' is not a number"),
    (("how many ?", "1 2", "+ number0 number1", "1e999"), "column Answer: '1e999' is not a number"),
    (("how many ?", "1 2", "+ number0"), "the row has 3 columns, the header 4"),
    (("how many ?", "1 2", "+ number0 number1", "3", "4"), "the row has 5 columns, the header 4"),
]
EQUATIONS = [
    ("+ number0 number2", "1 2", "'+ number0 number2' has no value with number0, number1"),
    ("number0", "", "'number0' has no value with no number"),
    ("+ number0", "1 2", "'+ number0' has no value with number0, number1"),
    ("number0 + number1", "1 2", "'number0 + number1' has no value with number0, number1"),
    ("", "1 2", "'' has no value with number0, number1"),
    ("/ number0 number1", "1 0", "'/ number0 number1' has no value with number0, number1"),
]


def with_row(task: str, name: str, row: tuple, folder: Path) -> Path:
    rows = [problem(n) for n in (range(6) if name.endswith("train.csv") else range(6, 10))]
    return write(folder, contents(task) | {name: table(*rows[:2], row, *rows[2:])})


@pytest.mark.parametrize(("task", "name"), [("svamp", "train.csv"), ("mawps", "fold0/dev.csv"), ("asdiv_a", "fold0/train.csv")])
@pytest.mark.parametrize(("row", "said"), MATHS, ids=lambda value: repr(value)[:40])
def test_a_row_that_is_no_problem(task, name, row, said, tmp_path):
    assert refused(task, with_row(task, name, row, tmp_path)) == f"{tmp_path / name}, {place(4, said)}{remedy(task)}"


@pytest.mark.parametrize(("equation", "numbers", "said"), EQUATIONS)
def test_an_equation_to_train_on_has_a_value_and_a_held_out_one_need_not(equation, numbers, said, tmp_path):
    row = ("how many ?", numbers, equation, "3")
    train = refused("svamp", with_row("svamp", "train.csv", row, tmp_path / "a"))
    assert train == f"{tmp_path / 'a' / 'train.csv'}, line 4, column Equation: {said}{remedy('svamp')}"
    assert read_examples("svamp", with_row("svamp", "dev.csv", row, tmp_path / "b")).held_out[2].equation == equation


@pytest.mark.parametrize(("row", "line"), [(0, 2), (3, 6)])
def test_a_damaged_quote_is_named_where_its_row_begins(row, line, tmp_path):
    rows = [table(problem(n)).split("\n", 1)[1] for n in range(6)]
    if row:
        rows[1] = table(("how\nmany ?", "1", "number0", "1")).split("\n", 1)[1]
    for text, fault in (('"' + rows[row], "unexpected end of data"), ('"how" many ?' + rows[row], """',' expected after '"'""")):
        content = table() + "".join([*rows[:row], text, *rows[row + 1 :]])
        said = refused("svamp", write(tmp_path, contents("svamp") | {"train.csv": content}))
        assert said == f"{tmp_path / 'train.csv'}, line {line}: the row cannot be read ({fault}){remedy('svamp')}"


def test_other_faults_are_named_where_their_row_ends_in_the_file(tmp_path):
    rows = [("how\nmany\n?", "1", "number0", "1"), ("how\nmany ?", "1", "number0", "one")]
    said = refused("svamp", write(tmp_path, contents("svamp") | {"dev.csv": table(*rows)}))
    assert said.startswith(f"{tmp_path / 'dev.csv'}, line 6, column Answer: 'one' is not a number;")


@pytest.mark.parametrize(
    ("task", "header", "there", "wanted"),
    [
        ("sst2", "index\tsentence", "'index, sentence' (a test file without labels?)", "sentence, label"),
        ("sst2", "text\tlabel", "'text, label'", "sentence, label"),
        ("sst2", "sentence,label", "'sentence,label'", "sentence, label"),
        ("sst2", "sentence\tlabel\tlabel", "'sentence, label, label' (a test file without labels?)", "sentence, label"),
        ("sst2", "a film\t1", "'a film, 1'", "sentence, label"),
        ("svamp", "Question,Numbers,Answer", "'Question, Numbers, Answer'", "Question, Numbers, Equation, Answer"),
        ("svamp", "question,numbers,equation,answer", "'question, numbers, equation, answer'", "Question, Numbers, Equation, Answer"),
        ("svamp", "x" * 90, f"'{'x' * 79}...", "Question, Numbers, Equation, Answer"),
    ],
)
def test_other_columns_are_named_beside_those_wanted(task, header, there, wanted, tmp_path):
    name = kind_of(task).files(0)[1]
    text = contents(task)[name]
    write(tmp_path, contents(task) | {name: header + text[text.index("\n") :]})
    assert refused(task, tmp_path) == f"{tmp_path / name}, line 1: the columns are {there}, expected {wanted}{remedy(task)}"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("index", [0, 1])
def test_files_without_rows(task, index, tmp_path):
    name = kind_of(task).files(0)[index]
    for content in (b"", b"\n", b"\xef\xbb\xbf", b" \r\n\n"):
        assert refused(task, write(tmp_path, contents(task) | {name: content})) == f"{tmp_path / name} is empty{remedy(task)}"
    if task != "csqa":
        for end in ("\n", ""):
            header = contents(task)[name].partition("\n")[0] + end
            assert refused(task, write(tmp_path, {name: header})) == f"{tmp_path / name} has a header and no rows{remedy(task)}"


@pytest.mark.parametrize("task", TASKS)
def test_bytes_that_are_no_utf8(task, tmp_path):
    name = kind_of(task).files(0)[0]
    lines = contents(task)[name].encode().splitlines(keepends=True)
    lines[2] = lines[2].replace(b" ", b"\xe9", 1)
    said = refused(task, write(tmp_path, contents(task) | {name: b"".join(lines)}))
    assert said == f"{tmp_path / name}, line 3: the byte 0xe9 is not UTF-8{remedy(task)}"


@pytest.mark.parametrize("task", TASKS)
def test_a_nul_byte_and_a_file_that_is_too_large(task, tmp_path, monkeypatch):
    name = kind_of(task).files(0)[0]
    text = contents(task)[name].replace("9", "\0", 1) if "9" in contents(task)[name] else contents(task)[name].replace("5", "\0", 1)
    said = refused(task, write(tmp_path, contents(task) | {name: text}))
    assert re.fullmatch(rf"{tmp_path / name}, line \d: a NUL byte is not text{re.escape(remedy(task))}", said)
    monkeypatch.setattr("utils.data.rows.LARGEST", 50)
    assert f"{tmp_path / name} is larger than 0 MB, too large for labelled rows" in refused(task, tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_missing(task, tmp_path):
    get = f": prepare it with `python data/prepare_task.py {task}`, or name another folder with --data DIR"
    assert refused(task, tmp_path / "absent") == f"{tmp_path / 'absent'} does not exist{get}"
    (tmp_path / "file").write_text("x")
    assert refused(task, tmp_path / "file") == f"{tmp_path / 'file'} is a file, not a folder{get}"
    for index, name in enumerate(kind_of(task).files(0)):
        folder = write(tmp_path / str(index), contents(task))
        (folder / name).unlink()
        assert refused(task, folder) == f"{folder / name} is missing{get}"
        (folder / name).mkdir()
        assert re.fullmatch(rf"{folder / name} cannot be read \(.+\): name another folder with --data DIR", refused(task, folder))


def test_tasks_and_folds_that_are_not_there(tmp_path):
    assert tuple(TASKS) == ("sst2", "csqa", "asdiv_a", "mawps", "svamp")
    assert refused("sst-2", tmp_path) == "the task 'sst-2' is not one of sst2, csqa, asdiv_a, mawps, svamp"
    for fold in (-1, 5):
        assert refused("mawps", write(tmp_path, contents("mawps")), fold) == f"--fold {fold}: MAWPS has the folds 0 to 4"
    assert refused("svamp", write(tmp_path, contents("svamp")), 1) == "--fold 1: SVAMP has no folds, leave it out"


@pytest.mark.parametrize("task", TASKS)
def test_files_that_were_mixed_up(task, tmp_path):
    files = contents(task)
    train, held_out = kind_of(task).files(0)
    same = write(tmp_path / "same", files | {held_out: files[train].replace("\n", "\r\n")})
    assert refused(task, same) == f"{same / train} and {Path(held_out).name} hold the same rows{remedy(task)}"
    swapped = write(tmp_path / "swapped", files | {held_out: files[train], train: files[held_out]})
    said = f"{swapped / train} has 4 rows, fewer than {Path(held_out).name} with 6: their names may have been swapped{remedy(task)}"
    assert refused(task, swapped) == said
    lines = files[train].splitlines(keepends=True)
    even = write(tmp_path / "even", files | {train: "".join(lines[: len(lines) - 2])})
    assert len(read_examples(task, even).train) == 4


@pytest.mark.parametrize("task", TASKS)
def test_the_first_of_several_faults_is_named(task, tmp_path):
    files = contents(task)
    for name in kind_of(task).files(0):
        files[name] = files[name] + "1\n2\n"
    for name in kind_of(task).files(0):
        line = len(files[name].splitlines()) - 1
        assert refused(task, write(tmp_path, files)).startswith(f"{tmp_path / name}, line {line}")
        files[name] = contents(task)[name]


def test_reading_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from utils.data.rows import TASKS, kind_of; [kind_of(task) for task in TASKS];"
        "sys.exit(bool({'torch', 'numpy', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
