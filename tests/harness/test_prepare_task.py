"""data/prepare_task.py: files from a folder, a server or the hub, and refusals."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prepare_task
from tests.harness.conftest import state
from tests.harness.test_examples import contents, problem, question, remedy, table, write
from tests.harness.test_published_rows import real
from utils import documents
from utils.data import rows as examples
from utils.data import sources
from utils.data.rows import TASKS, kind_of, read_examples
from utils.errors import UserError

MATHS = ("asdiv_a", "mawps", "svamp")
REPLACE = ": choose another --out, or replace it with --force"
BY_SOURCE = {task: prepare_task.source_remedy(task) for task in TASKS}


def published_files(task: str, url: str) -> sources.Files:
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents(task).items()}
    return sources.Files(f"{url}/{task}", digests)


@pytest.fixture
def maths(server, monkeypatch):
    """A server with the small files of the word problems, published there."""
    for task in MATHS:
        monkeypatch.setitem(sources.ROWS, task, published_files(task, server.url))
        server.files |= {f"/{task}/{name}": text.encode() for name, text in contents(task).items()}
    return server


@pytest.fixture
def published(monkeypatch):
    """The small files have the published numbers of rows."""

    def small(task: str) -> examples.Kind:
        return kind_of(task)._replace(counts=((6, 4),) * kind_of(task).folds)

    for module in (examples, prepare_task):
        monkeypatch.setattr(module, "kind_of", small)
    for task in ("sst2", "csqa"):
        digests = published_files(task, "").sha256
        monkeypatch.setitem(sources.ROWS, task, sources.ROWS[task]._replace(sha256=digests))


@pytest.fixture
def hub(monkeypatch):
    """Replaces load_dataset. `rows`: its result by split, an exception, or None for the small files. `asked`: its calls."""
    datasets = pytest.importorskip("datasets")
    hub = SimpleNamespace(rows=None, asked=[])

    def load_dataset(name: str, config: str | None = None, *, revision: str, split: str, streaming: bool):
        hub.asked.append((name, config, revision, split, streaming))
        if isinstance(hub.rows, Exception):
            raise hub.rows
        rows = hub.rows or hub_rows(contents("sst2" if "glue" in name else "csqa"))
        return datasets.Dataset.from_list(rows[split]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def hub_rows(files: dict[str, str]) -> dict[str, list[dict]]:
    """Return the rows of files as the hub has them."""
    rows = {}
    for split, (name, text) in zip(("train", "validation"), files.items(), strict=True):
        if name.endswith(".tsv"):
            pairs = [line.split("\t") for line in text.splitlines()[1:]]
            rows[split] = [{"sentence": sentence, "label": int(label), "idx": index} for index, (sentence, label) in enumerate(pairs)]
        else:
            rows[split] = [hub_question(json.loads(line)) for line in text.splitlines()]
    return rows


def hub_question(row: dict) -> dict:
    asked = row["question"]
    choices = {key: [choice[key] for choice in asked["choices"]] for key in ("label", "text")}
    asked = {"question": asked["stem"], "question_concept": asked.get("question_concept", "concept"), "choices": choices}
    return {"id": row["id"], **asked, "answerKey": row["answerKey"]}


def files_of(folder: Path) -> dict[str, str]:
    """The files of a prepared folder but its record."""
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert "rows.json" in files
    return {name: text for name, text in files.items() if name != "rows.json"}


def change(folder: Path, name: str, old: str, new: str) -> Path:
    (folder / name).write_text((folder / name).read_text().replace(old, new, 1))
    return folder


# where the files come from


@pytest.mark.parametrize("task", TASKS)
def test_only_the_files_of_the_task_are_taken_from_a_folder(task, run, data_dir, tmp_path):
    source = write(tmp_path / "mine", contents(task) | {"test.tsv": "not wanted", "fold0/notes": "not wanted"})
    folder, err = run(prepare_task, task, "--source", source)
    assert folder == data_dir / task and files_of(folder) == contents(task)
    folds = [read_examples(task, folder, fold) for fold in range(kind_of(task).folds)]
    lines = [f"{fold.title}: 6 training rows, 4 held out ({fold.split})" for fold in folds]
    assert err.splitlines() == [f"prepared {folder} from {source}", *lines] and os.access(folder / kind_of(task).files(0)[0], os.W_OK)


def test_a_subset_is_prepared_and_never_taken_for_the_full_set(run, refused, tmp_path):
    folder, err = run(prepare_task, "csqa", "--source", write(tmp_path / "mine", contents("csqa")))
    title = "CommonsenseQA (6 train rows, 4 dev rows; published 9,741 and 1,221)"
    assert err.splitlines()[1].startswith(f"{title}: ") and refused(prepare_task, "csqa") == f"{folder} holds {title}{REPLACE}"


def test_notes_on_the_held_out_rows_are_reported(run, tmp_path):
    files = contents("mawps") | {"fold2/dev.csv": table(problem(1), (*problem(7)[:3], "0"))}
    folder, err = run(prepare_task, "mawps", "--source", write(tmp_path / "mine", files))
    notes = read_examples("mawps", folder, 2).notes
    assert notes and err.splitlines()[3].endswith(f"2 held out (dev); {notes}")


@pytest.mark.parametrize("piece", [None, 200], ids=["whole", "cut and resumed"])
@pytest.mark.parametrize("task", MATHS)
def test_word_problems_are_downloaded_and_verified(task, piece, run, data_dir, maths, published):
    maths.cuts, maths.piece = (1_000 if piece else 0), piece
    folder, err = run(prepare_task, task)
    assert folder == data_dir / task and files_of(folder) == contents(task)
    count = len(maths.asked)
    assert list(dict.fromkeys(path for path, _ in maths.asked)) == [f"/{task}/{name}" for name in contents(task)]
    assert count > 2 * len(contents(task)) if piece else count == len(contents(task))
    assert f"prepared {folder} from {maths.url}/{task}\n" in err
    assert run(prepare_task, task)[1] == f"already prepared: {folder}\n" and len(maths.asked) == count


@pytest.mark.parametrize("option", [[], ["--hub"]], ids=str)
@pytest.mark.parametrize(("task", "asked"), [("sst2", ("nyu-mll/glue", "sst2")), ("csqa", ("tau/commonsense_qa", None))])
def test_the_hub_gives_the_same_rows(task, asked, option, run, data_dir, tmp_path, hub, published):
    folder, err = run(prepare_task, task, *option)
    pinned = sources.ROWS[task].revision
    assert folder == data_dir / task and hub.asked == [(*asked, pinned, split, True) for split in ("train", "validation")]
    found, wanted = read_examples(task, folder), read_examples(task, write(tmp_path / "mine", contents(task)))
    assert (found.train, found.held_out) == (wanted.train, wanted.held_out)
    assert err.splitlines()[2:] == [f"prepared {folder} from {asked[0]}@{pinned[:8]}", f"{wanted.title}: 6 training rows, 4 held out (dev)"]
    assert run(prepare_task, task)[1] == f"already prepared: {folder}\n" and len(hub.asked) == 2


def test_a_published_source_is_one_entry(run, refused, server, published, monkeypatch):
    monkeypatch.delitem(sources.ROWS, "csqa")
    assert refused(prepare_task, "csqa") == f"csqa has no published source: {BY_SOURCE['csqa']}"
    monkeypatch.setitem(sources.ROWS, "csqa", published_files("csqa", server.url))
    server.files = {f"/csqa/{name}": text.encode() for name, text in contents("csqa").items()}
    assert files_of(run(prepare_task, "csqa")[0]) == contents("csqa")


@pytest.mark.parametrize("task", ["sst2", "csqa"])
def test_rows_of_the_hub_give_the_published_files_byte_for_byte(task):
    files = {name: (real(task) / name).read_text(encoding="utf-8") for name in kind_of(task).files(0)}
    hub = sources.ROWS[task]
    for text, rows in zip(files.values(), hub_rows(files).values(), strict=True):
        assert hub.header + "".join(f"{hub.line(row)}\n" for row in rows) == text


@pytest.mark.parametrize("task", MATHS)
def test_the_published_files_have_the_recorded_hashes(task):
    url, digests = sources.ROWS[task]
    assert url.startswith("https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/data/")
    assert list(digests) == prepare_task.file_names(task)
    folder = real(task)
    assert {name: prepare_task.sha256(folder / name) for name in digests} == digests


@pytest.mark.parametrize("task", TASKS)
def test_a_prepared_row_that_has_changed_is_refused(task, run, refused, tmp_path):
    """Every row is still a valid one. Without rows.json the files are taken for the user's own."""
    folder, _ = run(prepare_task, task, "--source", write(tmp_path / "mine", contents(task)))
    last, record = prepare_task.file_names(task)[-1], folder / "rows.json"
    fold, whole = kind_of(task).folds - 1, record.read_text()
    change(folder, last, "8", "4")
    remedy = f"prepare the files again with `python data/prepare_task.py {task} --force`, or remove rows.json if they are your own"
    for refusal in (lambda: refused(prepare_task, task), lambda: refused(prepare_task, task, "--source", folder, "--out", tmp_path / "b")):
        assert refusal().startswith(f"{folder / last} is not the file that rows.json records: {remedy}")
    change(folder, "rows.json", task, "other")
    with pytest.raises(UserError, match=r"rows\.json is damaged: "):
        read_examples(task, folder, fold)
    documents.write(record, {name: value for name, value in json.loads(whole).items() if name not in documents.MARKS} | {"task": "x"})
    with pytest.raises(UserError, match=rf"rows\.json is of the task x, not {task}"):
        read_examples(task, folder, fold)
    record.unlink()
    assert read_examples(task, folder, fold).name == task


# refusals


@pytest.mark.parametrize("task", ["svamp", "mawps"])
def test_a_file_that_cannot_be_downloaded(task, refused, data_dir, maths, published, monkeypatch):
    *_, last = contents(task)
    url = f"{maths.url}/{task}/{last}"
    content = maths.files.pop(f"/{task}/{last}")
    assert refused(prepare_task, task) == f"{url} cannot be downloaded (HTTP Error 404: Not Found): {BY_SOURCE[task]}"
    maths.files[f"/{task}/{last}"] = b"<html>log in first</html>"
    line = refused(prepare_task, task)
    assert line.startswith(f"{url} returned unexpected content (25 bytes with sha256 ") and line.endswith(f": {BY_SOURCE[task]}")
    maths.files[f"/{task}/{last}"], maths.cuts, maths.piece = content, 1_000, 10
    line = refused(prepare_task, task)
    assert line.endswith(f"cannot be downloaded (the connection was cut): {BY_SOURCE[task]}") and not list(data_dir.iterdir())


@pytest.mark.parametrize("task", ["sst2", "csqa"])
def test_a_hub_that_does_not_answer(task, refused, hub):
    hub.rows = ConnectionError("no route\nto host")
    name = sources.ROWS[task].name
    assert refused(prepare_task, task) == f"{name} cannot be read (no route to host): {BY_SOURCE[task]}"
    hub.rows = ConnectionError()
    assert refused(prepare_task, task) == f"{name} cannot be read (ConnectionError): {BY_SOURCE[task]}"


def test_a_dataset_that_has_changed_on_the_hub(refused, hub, published):
    hub.rows = {split: [{"text": "a", "label": 1}] for split in ("train", "validation")}
    assert refused(prepare_task, "sst2") == f"nyu-mll/glue has the columns text, label and no sentence: {BY_SOURCE['sst2']}"
    hub.rows = hub_rows(contents("sst2"))
    hub.rows["validation"][1]["label"] = -1
    line = refused(prepare_task, "sst2")
    assert line.startswith("nyu-mll/glue@bcdcba79/dev.tsv, line 3, column label: '-1' ") and line.endswith(f"; {BY_SOURCE['sst2']}")
    hub.rows = hub_rows(contents("csqa"))
    hub.rows["train"][2]["answerKey"] = ""
    assert refused(prepare_task, "csqa").startswith(
        "tau/commonsense_qa@94630fe3/train_rand_split.jsonl, line 3, answerKey: the answer is missing"
    )
    hub.rows = hub_rows(contents("csqa"))
    hub.rows["train"][2]["question"] = "What?"
    line = refused(prepare_task, "csqa")
    assert line.startswith("tau/commonsense_qa@94630fe3/train_rand_split.jsonl has sha256 ") and line.endswith(f": {BY_SOURCE['csqa']}")
    hub.rows = hub_rows(contents("csqa"))
    hub.rows["train"].append(hub_question(json.loads(question(20))))
    title = "CommonsenseQA (7 train rows, 4 dev rows; published 6 and 4)"
    assert refused(prepare_task, "csqa") == f"tau/commonsense_qa@94630fe3 holds {title}: {BY_SOURCE['csqa']}"


def test_the_rows_of_a_source_are_checked_in_every_fold(refused, tmp_path):
    source = change(write(tmp_path / "mine", contents("mawps")), "fold4/dev.csv", "10.5", "ten")
    line = refused(prepare_task, "mawps", "--source", source)
    assert line == f"{source / 'fold4' / 'dev.csv'}, line 4, column Answer: 'ten' is not a number{remedy('mawps')}"
    (source / "fold4" / "dev.csv").unlink()
    for task, folder, name, names in (
        ("mawps", source, "fold4/dev.csv", "fold0/train.csv and fold0/dev.csv, and so on to fold4"),
        ("csqa", tmp_path / "no", "train_rand_split.jsonl", "train_rand_split.jsonl and dev_rand_split.jsonl"),
    ):
        line = refused(prepare_task, task, "--source", folder)
        assert line == f"--source {folder} has no {name}: give a folder with {names} by --source DIR"


def test_unusable_command_lines_are_refused(refused):
    assert refused(prepare_task, "mawps", "--hub") == "--hub has sst2 and csqa, not mawps: leave it out"
    for argv, word in ((["sst2", "--hub", "--source", "x"], "not allowed with"), (["sst-2"], "invalid choice: 'sst-2'"), ([], "TASK")):
        assert word in refused(prepare_task, *argv)


# folders that are there


@pytest.mark.parametrize("task", TASKS)
def test_a_prepared_folder_is_compared_with_its_source(task, run, refused, tmp_path, published, monkeypatch):
    if task in MATHS:
        monkeypatch.setitem(sources.ROWS, task, published_files(task, "http://127.0.0.1:9"))
    folder, _ = run(prepare_task, task, "--source", write(tmp_path / "mine", contents(task)))
    for argv in ([], ["--source", folder]):
        assert run(prepare_task, task, *argv)[1] == f"already prepared: {folder}\n"
    *_, last = contents(task)
    source = change(write(tmp_path / "other", contents(task)), last, "9", "8")
    assert refused(prepare_task, task, "--source", source) == f"{folder / last} differs from the file of {source}{REPLACE}"
    run(prepare_task, task, "--source", source, "--force")
    if task in MATHS:
        assert refused(prepare_task, task) == f"{folder / last} differs from the file of http://127.0.0.1:9/{task}{REPLACE}"
    (folder / last).write_text((folder / last).read_text() + "x\n")
    line = refused(prepare_task, task, "--source", source)
    assert line.startswith(f"{folder / last}, line ") and line.endswith(f"{remedy(task)}; or choose another --out")


def test_a_complete_folder_with_another_file_is_never_replaced(run, refused, data_dir, tmp_path):
    argv = ["mawps", "--source", write(tmp_path / "mine", contents("mawps"))]
    run(prepare_task, *argv)
    (data_dir / "mawps" / "fold0" / "thesis.txt").write_text("mine")
    for force in ([], ["--force"]):
        line = refused(prepare_task, *argv, *force)
        assert line == f"{data_dir / 'mawps'} holds fold0/thesis.txt, which is not part of mawps: choose another --out, or move it"


def test_the_working_folder_is_not_replaced(run, refused, tmp_path, monkeypatch):
    source = write(tmp_path / "mine", contents("mawps"))
    folder, _ = run(prepare_task, "mawps", "--source", source)
    for inner in (folder, folder / "fold1"):
        monkeypatch.chdir(inner)
        line = refused(prepare_task, "mawps", "--source", source, "--out", folder, "--force")
        assert line == f"{folder} is the working folder, which cannot be replaced: start the program from another"
        assert "already prepared" in run(prepare_task, "mawps", "--source", source, "--out", folder)[1]


def test_the_old_folder_comes_back_where_its_replacement_is_interrupted(run, data_dir, tmp_path, monkeypatch):
    run(prepare_task, "mawps", "--source", change(write(tmp_path / "old", contents("mawps")), "fold1/dev.csv", "9", "8"))
    before, rename = state(data_dir), os.rename

    def interrupted(old: Path, new: Path) -> None:
        if str(old).endswith(".tmp"):
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(prepare_task, "mawps", "--source", write(tmp_path / "mine", contents("mawps")), "--force")
    assert state(data_dir) == before


def test_a_folder_is_replaced_even_where_the_last_step_is_interrupted(run, data_dir, tmp_path, monkeypatch):
    run(prepare_task, "svamp", "--source", change(write(tmp_path / "old", contents("svamp")), "dev.csv", "9", "8"))

    def interrupted(folder: Path) -> None:
        if folder == data_dir:
            raise KeyboardInterrupt

    monkeypatch.setattr(documents, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(prepare_task, "svamp", "--source", write(tmp_path / "mine", contents("svamp")), "--force")
    assert [path.name for path in data_dir.iterdir()] == ["svamp"] and files_of(data_dir / "svamp") == contents("svamp")


def test_an_interrupted_download_leaves_nothing(run, data_dir, maths, published, monkeypatch):
    download = prepare_task.download

    def interrupted(url: str, *args: object) -> None:
        if url.endswith("fold2/train.csv"):
            raise KeyboardInterrupt
        download(url, *args)

    monkeypatch.setattr(prepare_task, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(prepare_task, "mawps")
    assert len(maths.asked) == 4 and not list(data_dir.iterdir())
