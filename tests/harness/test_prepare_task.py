"""data/prepare_task.py: the files it brings from a folder, a server or the hub, what it refuses, and that it leaves nothing half done."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.harness.test_examples import contents, problem, question, real, remedy, table, write
from utils.data.corpus import rows as examples
from utils.data.rows import KINDS, TASKS, read_examples
from utils.errors import UserError

SCRIPT = ROOT / "data" / "prepare_task.py"
spec = importlib.util.spec_from_file_location("prepare_task_script", SCRIPT)
script = sys.modules["prepare_task_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

MATHS = ("asdiv_a", "mawps", "svamp")
OTHER = ": choose another --out, or replace it with --force"
BY_HAND = {task: script.by_hand(task) for task in TASKS}


def downloads(url: str = "http://127.0.0.1:9") -> dict[str, script.Download]:
    """The small files, at `url`/TASK."""
    digests = {task: {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents(task).items()} for task in MATHS}
    return {task: script.Download(f"{url}/{task}", digests[task]) for task in MATHS}


@pytest.fixture
def run(data_dir, capsys):
    """run(*argv, known=...) -> (the folder named on the last line of stdout, stderr)."""

    def call(*argv: object, known: dict[str, script.Download] = downloads()) -> tuple[Path, str]:  # noqa: B008
        assert script.main([str(arg) for arg in argv], known, data_dir) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        return Path(out.splitlines()[-1]), err

    return call


@pytest.fixture
def published(monkeypatch):
    """The small files have the published numbers of rows."""
    for task, kind in KINDS.items():
        monkeypatch.setitem(examples.KINDS, task, kind._replace(counts=((6, 4),) * kind.folds))


@pytest.fixture
def hub(monkeypatch):
    """What load_dataset gives: rows by split, an exception, or None for the small files. Also what it was asked for."""
    datasets = pytest.importorskip("datasets")
    hub = SimpleNamespace(rows=None, asked=[])

    def load_dataset(name: str, config: str | None = None, *, split: str, streaming: bool):
        hub.asked.append((name, config, split, streaming))
        if isinstance(hub.rows, Exception):
            raise hub.rows
        rows = hub.rows or hub_rows(contents("sst2" if "glue" in name else "csqa"))
        return datasets.Dataset.from_list(rows[split]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def hub_rows(files: dict[str, str]) -> dict[str, list[dict]]:
    """The rows of files as the hub has them."""
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


class Server(ThreadingHTTPServer):
    """Serves `files` by their paths; `piece`: every answer ends after so many bytes; `asked`: the path of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/{task}/{name}": text.encode() for task in MATHS for name, text in contents(task).items()}
        self.piece, self.asked = None, []
        self.known = downloads(f"http://127.0.0.1:{self.server_port}")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, start = self.server, int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        server.asked.append(self.path)
        body = server.files.get(self.path)
        self.send_response(404 if body is None else 206 if start else 200)
        body = (body or b"")[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.piece])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def state(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def refused(run, data_dir: Path, *argv: object, **kwargs: object) -> str:
    """What the command says; it leaves the data folder as it was."""
    before = state(data_dir)
    with pytest.raises(UserError) as error:
        run(*argv, **kwargs)
    assert state(data_dir) == before and not list(data_dir.glob(".*")) and "\n" not in str(error.value)
    return str(error.value)


def change(folder: Path, name: str, old: str, new: str) -> Path:
    (folder / name).write_text((folder / name).read_text().replace(old, new, 1))
    return folder


# where the files are from


@pytest.mark.parametrize("task", TASKS)
def test_files_are_taken_from_a_folder_and_nothing_else_is(task, run, data_dir, tmp_path):
    source = write(tmp_path / "mine", contents(task) | {"test.tsv": "not wanted", "fold0/notes": "not wanted"})
    folder, err = run(task, "--source", source)
    assert folder == data_dir / task and files_of(folder) == contents(task) and list(data_dir.iterdir()) == [folder]
    found = [read_examples(task, folder, fold) for fold in range(KINDS[task].folds)]
    lines = [f"{some.title}: 6 rows to train on, 4 held out ({some.split})" for some in found]
    assert err.splitlines() == [f"prepared {folder} from {source}", *lines]
    assert folder.stat().st_mode == data_dir.stat().st_mode and os.access(folder / KINDS[task].files(0)[0], os.W_OK)


def test_a_part_of_a_set_is_prepared_and_never_taken_for_the_set(run, data_dir, tmp_path):
    folder, err = run("csqa", "--source", write(tmp_path / "mine", contents("csqa")))
    title = "CommonsenseQA (6 train rows, 4 dev rows; published 9,741 and 1,221)"
    assert err.splitlines()[1].startswith(f"{title}: ") and refused(run, data_dir, "csqa") == f"{folder} holds {title}{OTHER}"


def test_notes_are_said(run, tmp_path):
    files = contents("mawps") | {"fold2/dev.csv": table(problem(1), (*problem(7)[:3], "0"))}
    _, err = run("mawps", "--source", write(tmp_path / "mine", files))
    said = (
        "2 held out (dev)",
        "1 of 2 dev rows have a question that is in train too",
        "1 of 2 dev rows have an equation that does not give",
    )
    assert "; ".join(said) in err.splitlines()[3]


@pytest.mark.parametrize("piece", [None, 200], ids=["whole", "cut and resumed"])
@pytest.mark.parametrize("task", MATHS)
def test_problems_are_downloaded_and_their_hashes_checked(task, piece, run, data_dir, server, published):
    server.piece = piece
    folder, err = run(task, known=server.known)
    assert folder == data_dir / task and files_of(folder) == contents(task) and list(data_dir.iterdir()) == [folder]
    count = len(server.asked)
    assert list(dict.fromkeys(server.asked)) == [f"/{task}/{name}" for name in contents(task)]
    assert count > 2 * len(contents(task)) if piece else count == len(contents(task))
    assert f"prepared {folder} from {server.known[task].url}\n" in err
    assert run(task, known=server.known)[1] == f"already prepared: {folder}\n" and len(server.asked) == count


@pytest.mark.parametrize("option", [[], ["--hub"]], ids=str)
@pytest.mark.parametrize(("task", "asked"), [("sst2", ("nyu-mll/glue", "sst2")), ("csqa", ("tau/commonsense_qa", None))])
def test_the_hub_gives_the_same_rows(task, asked, option, run, data_dir, tmp_path, hub, published):
    folder, err = run(task, *option)
    assert folder == data_dir / task and list(data_dir.iterdir()) == [folder]
    assert hub.asked == [(*asked, "train", True), (*asked, "validation", True)]
    found, wanted = read_examples(task, folder), read_examples(task, write(tmp_path / "mine", contents(task)))
    assert (found.train, found.held_out) == (wanted.train, wanted.held_out)
    assert err.splitlines()[2:] == [f"prepared {folder} from {asked[0]}", f"{wanted.title}: 6 rows to train on, 4 held out (dev)"]
    assert run(task)[1] == f"already prepared: {folder}\n" and len(hub.asked) == 2


@pytest.mark.parametrize("task", ["sst2", "csqa"])
def test_the_published_rows_of_the_hub_give_the_published_files(task, run, hub):
    """Byte for byte."""
    files = {name: (real(task) / name).read_text(encoding="utf-8") for name in KINDS[task].files(0)}
    hub.rows = hub_rows(files)
    folder, err = run(task)
    assert files_of(folder) == files and KINDS[task].title + ": " in err


# what cannot be had


@pytest.mark.parametrize("task", ["svamp", "mawps"])
def test_a_file_that_cannot_be_downloaded(task, run, data_dir, server, published):
    url = server.known[task].url
    *_, last = contents(task)
    del server.files[f"/{task}/{last}"]
    said = refused(run, data_dir, task, known=server.known)
    assert said == f"{url}/{last} cannot be downloaded (HTTP Error 404: Not Found): {BY_HAND[task]}"
    server.files[f"/{task}/{last}"] = b"<html>log in first</html>"
    said = refused(run, data_dir, task, known=server.known)
    assert said.startswith(f"{url}/{last} sent something else (25 bytes with sha256 ") and said.endswith(f": {BY_HAND[task]}")
    assert refused(run, data_dir, task).startswith(f"http://127.0.0.1:9/{task}/")
    server.piece = 10
    said = refused(run, data_dir, task, known=server.known)
    assert said.endswith(f"cannot be downloaded (the connection was cut): {BY_HAND[task]}") and not list(data_dir.iterdir())


@pytest.mark.parametrize("task", ["sst2", "csqa"])
def test_a_hub_that_does_not_answer(task, run, data_dir, hub):
    hub.rows = ConnectionError("no route\nto host")
    name = script.HUB[task].name
    assert refused(run, data_dir, task) == f"{name} cannot be read: no route to host; {BY_HAND[task]}"
    hub.rows = ConnectionError()
    assert refused(run, data_dir, task) == f"{name} cannot be read: ConnectionError; {BY_HAND[task]}"


def test_a_hub_that_has_changed(run, data_dir, hub, published):
    hub.rows = {split: [{"text": "a", "label": 1}] for split in ("train", "validation")}
    assert refused(run, data_dir, "sst2") == f"nyu-mll/glue has the columns text, label and no sentence: {BY_HAND['sst2']}"
    hub.rows = hub_rows(contents("sst2"))
    hub.rows["validation"][1]["label"] = -1
    said = "nyu-mll/glue/dev.tsv, line 3, column label: '-1' is neither 0 nor 1, it marks a test file without labels" + remedy("sst2")
    assert refused(run, data_dir, "sst2") == f"{said}; {BY_HAND['sst2']}"
    hub.rows = hub_rows(contents("csqa"))
    hub.rows["train"][2]["answerKey"] = ""
    assert refused(run, data_dir, "csqa").startswith("tau/commonsense_qa/train_rand_split.jsonl, line 3, answerKey: the answer is missing")
    hub.rows = hub_rows(contents("csqa"))
    hub.rows["train"].append(hub_question(json.loads(question(20))))
    said = f"tau/commonsense_qa gives CommonsenseQA (7 train rows, 4 dev rows; published 6 and 4): {BY_HAND['csqa']}"
    assert refused(run, data_dir, "csqa") == said


def test_rows_of_a_source_are_checked_in_every_fold(run, data_dir, tmp_path):
    source = change(write(tmp_path / "mine", contents("mawps")), "fold4/dev.csv", "10.5", "ten")
    said = f"{source / 'fold4' / 'dev.csv'}, line 4, column Answer: 'ten' is not a number{remedy('mawps')}"
    assert refused(run, data_dir, "mawps", "--source", source) == said
    (source / "fold4" / "dev.csv").unlink()
    for task, folder, name, names in (
        ("mawps", source, "fold4/dev.csv", "fold0/train.csv and fold0/dev.csv, and so on to fold4"),
        ("csqa", tmp_path / "no", "train_rand_split.jsonl", "train_rand_split.jsonl and dev_rand_split.jsonl"),
    ):
        said = f"--source {folder} has no {name}: --source DIR takes a folder with {names}"
        assert refused(run, data_dir, task, "--source", folder) == said


def test_command_lines_that_cannot_be_meant(run, data_dir, capsys):
    said = "--hub has sst2 and csqa: leave it out, mawps is downloaded from github.com/arkilpatel/SVAMP"
    assert refused(run, data_dir, "mawps", "--hub") == said
    for argv, word in ((["sst2", "--hub", "--source", "x"], "not allowed with"), (["sst-2"], "invalid choice: 'sst-2'"), ([], "TASK")):
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        assert stop.value.code == 2 and word in capsys.readouterr().err


# folders that are there


@pytest.mark.parametrize("task", TASKS)
def test_a_prepared_folder_is_left_alone(task, run, data_dir, tmp_path, published, monkeypatch):
    source = write(tmp_path / "mine", contents(task))
    folder, _ = run(task, "--source", source)
    before = state(data_dir)
    monkeypatch.setattr(script, "write_synced", None)
    monkeypatch.setattr(script, "download", None)
    for argv in (["--source", source], [], ["--source", folder]):
        assert run(task, *argv) == (folder, f"already prepared: {folder}\n")
    assert state(data_dir) == before


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_with_other_rows_is_refused_and_replaced_by_force(task, run, data_dir, tmp_path, published):
    folder, _ = run(task, "--source", write(tmp_path / "mine", contents(task)))
    *_, last = contents(task)
    source = change(write(tmp_path / "other", contents(task)), last, "9", "8")
    assert refused(run, data_dir, task, "--source", source) == f"{folder / last} is not the file of {source}{OTHER}"
    assert run(task, "--source", source, "--force")[0] == folder
    assert files_of(folder) == files_of(source) != contents(task) and list(data_dir.iterdir()) == [folder]
    if task in MATHS:
        assert refused(run, data_dir, task) == f"{folder / last} is not the file of http://127.0.0.1:9/{task}{OTHER}"


@pytest.mark.parametrize("task", TASKS)
def test_a_damaged_folder_is_refused_and_mended_by_force(task, run, data_dir, tmp_path):
    source = write(tmp_path / "mine", contents(task))
    folder, _ = run(task, "--source", source)
    *_, last = contents(task)
    (folder / last).write_text((folder / last).read_text() + "x\n")
    said = refused(run, data_dir, task, "--source", source)
    assert said.startswith(f"{folder / last}, line ") and said.endswith(f"{remedy(task)}; or choose another --out")
    (folder / last).unlink()
    assert refused(run, data_dir, task, "--source", source) == f"{folder} holds {sorted(files_of(folder))[0]} but no {last}{OTHER}"
    run(task, "--source", source, "--force")
    assert files_of(folder) == contents(task)


@pytest.mark.parametrize("force", [[], ["--force"]], ids=str)
def test_a_folder_of_something_else_is_never_touched(force, run, data_dir, tmp_path):
    source = write(tmp_path / "mine", contents("mawps"))
    run("mawps", "--source", source)
    (data_dir / "mawps" / "fold0" / "thesis.txt").write_text("mine")
    said = "holds fold0/thesis.txt, which is no file of mawps: choose another --out, or move it"
    assert refused(run, data_dir, "mawps", "--source", source, *force) == f"{data_dir / 'mawps'} {said}"
    (data_dir / "link").mkdir()
    (data_dir / "link" / "books").symlink_to(tmp_path)
    (data_dir / "file").write_text("keep")
    for out, said in (
        ("link", "link holds books, which is no file of mawps: choose another --out, or move it"),
        ("file", "file is a file, not a folder: choose another --out, or move it"),
        ("file/out", "file: File exists"),
    ):
        assert refused(run, data_dir, "mawps", "--source", source, "--out", data_dir / out, *force) == f"{data_dir}/{said}"


def test_an_empty_folder_is_filled_and_a_folder_behind_a_link_stays_there(run, data_dir, tmp_path):
    source = write(tmp_path / "mine", contents("svamp"))
    (tmp_path / "disk").mkdir()
    (data_dir / "svamp").symlink_to(tmp_path / "disk")
    for force in ([], ["--force"]):
        assert run("svamp", "--source", source, *force)[0] == data_dir / "svamp"
        assert files_of(tmp_path / "disk") == contents("svamp") and (data_dir / "svamp").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk", "mine"]


def test_the_working_folder_is_not_replaced(run, data_dir, tmp_path, monkeypatch):
    source = write(tmp_path / "mine", contents("mawps"))
    folder, _ = run("mawps", "--source", source)
    for inner in (folder, folder / "fold1"):
        monkeypatch.chdir(inner)
        said = f"{folder} is the working folder, which cannot be replaced: start the program from another"
        assert refused(run, data_dir, "mawps", "--source", source, "--out", folder, "--force") == said
        assert "already prepared" in run("mawps", "--source", source, "--out", folder)[1]


# interruptions


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("failing", ["write_synced", "read_examples", "sync_folder", "install", "second rename"])
def test_an_interrupted_run_leaves_what_was_there(failing, force, run, data_dir, tmp_path, monkeypatch):
    old = change(write(tmp_path / "old", contents("mawps")), "fold1/dev.csv", "9", "8")
    if force:
        run("mawps", "--source", old)
    source = write(tmp_path / "mine", contents("mawps"))
    rename = os.rename

    def interrupted(*args, **kwargs):
        if failing == "second rename" and not str(args[0]).endswith(".tmp"):
            return rename(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "rename") if failing == "second rename" else (script, failing)), interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("mawps", "--source", source, *["--force"] * force)
    assert [path.name for path in data_dir.iterdir()] == ["mawps"] * force
    if force:
        assert files_of(data_dir / "mawps") == files_of(old)


def test_a_folder_is_replaced_even_where_the_last_step_is_interrupted(run, data_dir, tmp_path, monkeypatch):
    run("svamp", "--source", change(write(tmp_path / "old", contents("svamp")), "dev.csv", "9", "8"))
    sync = script.sync_folder

    def interrupted(folder: Path) -> None:
        if folder == data_dir:
            raise KeyboardInterrupt
        sync(folder)

    monkeypatch.setattr(script, "sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("svamp", "--source", write(tmp_path / "mine", contents("svamp")), "--force")
    assert [path.name for path in data_dir.iterdir()] == ["svamp"] and files_of(data_dir / "svamp") == contents("svamp")


def test_an_interrupted_download_leaves_nothing(run, data_dir, server, published, monkeypatch):
    download = script.download

    def interrupted(url: str, *args):
        if url.endswith("fold2/train.csv"):
            raise KeyboardInterrupt
        download(url, *args)

    monkeypatch.setattr(script, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("mawps", known=server.known)
    assert len(server.asked) == 4 and not list(data_dir.iterdir())


@pytest.mark.parametrize("same", [True, False])
def test_another_process_that_was_faster(same, run, data_dir, tmp_path, monkeypatch):
    source = write(tmp_path / "mine", contents("sst2"))

    def slower(built: Path, out: Path) -> None:
        shutil.copytree(built, out)
        if not same:
            change(out, "dev.tsv", "film", "movie")
        os.rename(built, out)  # fails, since the folder is full

    monkeypatch.setattr(script, "install", slower)
    if same:
        assert run("sst2", "--source", source) == (data_dir / "sst2", f"already prepared: {data_dir / 'sst2'}\n")
    else:
        with pytest.raises(UserError, match="is not the file of"):
            run("sst2", "--source", source)
    assert [path.name for path in data_dir.iterdir()] == ["sst2"]


def test_a_full_disk_is_said(run, data_dir, tmp_path, hub, server, published, monkeypatch):
    source = write(tmp_path / "mine", contents("sst2"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=16 << 20))
        assert "MB are needed" in refused(run, data_dir, "sst2", "--source", source)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert "MB are needed" in refused(run, data_dir, "sst2")
        assert "MB are needed" in refused(run, data_dir, "svamp", known=server.known)
    assert not hub.asked and not server.asked

    def full(*args):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(run, data_dir, "sst2", "--source", source) == "x: No space left on device"


def test_a_terminated_process_leaves_nothing(tmp_path):
    """The command itself, while it reads what it has copied."""
    files = contents("sst2") | {"train.tsv": "sentence\tlabel\n" + "the film \t1\n" * 400_000}
    write(tmp_path / "mine", files)
    argv = [sys.executable, str(SCRIPT), "sst2", "--source", "mine", "--out", "out"]
    command = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not any(path.stat().st_size for path in tmp_path.glob(".out.*.tmp/dev.tsv")):
        assert command.poll() is None and time.monotonic() < end, command.communicate()
        time.sleep(0.005)
    command.send_signal(signal.SIGTERM)
    assert command.communicate() == ("", "") and command.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_itself(tmp_path):
    """It needs neither torch nor, where nothing is read from the hub, datasets."""
    code = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: " + (
        "sys.exit('slow') if {'torch', 'transformers', 'datasets'} & sys.modules.keys() else None"
    )

    def command(*argv: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    write(tmp_path / "mine", contents("svamp"))
    status, out, err = command("svamp", "--source", "mine", "--out", "a/b/out")
    assert (status, out) == (0, "a/b/out\n") and err.startswith("prepared a/b/out from mine\nSVAMP (6 train rows")
    assert command("svamp", "--source", "mine", "--out", "a/b/out") == (0, "a/b/out\n", "already prepared: a/b/out\n")
    assert command("sst2", "--source", "a/b/out") == (2, "", f"error: --source a/b/out has no train.tsv: {BY_HAND['sst2']}\n")
    assert command("sst-2")[:2] == (2, "") and sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]


@pytest.mark.parametrize("task", MATHS)
def test_the_published_files_have_the_recorded_hashes(task):
    url, digests = script.DOWNLOADS[task]
    assert url.startswith("https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/data/")
    assert list(digests) == script.names_of(task)
    folder = real(task)
    assert {name: script.sha256_of(folder / name) for name in digests} == digests
