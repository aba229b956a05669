"""The contract of data/prepare.py, prepare_pieces.py and prepare_task.py: each builds a folder, touches nothing else, and leaves
nothing behind when it fails.
"""

import gzip
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from data import dataset, prepare, prepare_pieces, prepare_task
from tests import tiny
from tests.conftest import ROOT
from tests.harness.conftest import state
from tests.harness.test_examples import contents
from tests.harness.test_examples import write as write_files
from utils import documents
from utils.data.corpus import Corpus
from utils.errors import UserError

LINES = "the frozen router sends each token to more experts\n"


class Case(NamedTuple):
    """A program, the name it is given, its source in a folder, and its options. `source(folder, other)` writes one of two contents."""

    program: object
    name: str
    source: Callable[[Path, bool], list]
    last: str  # the file without which the folder is incomplete

    def argv(self, folder: Path, other: bool = False) -> list:
        folder.mkdir(exist_ok=True)
        return [self.program, self.name, *self.source(folder, other)]


def text_source(folder: Path, other: bool) -> list:
    (folder / "a").write_text(LINES * (50 + other))
    return ["--source", folder / "a"]


def pieces_source(folder: Path, other: bool) -> list:
    pytest.importorskip("transformers"), pytest.importorskip("datasets")
    tiny.write_tokenizer(folder / "tiny-bert")
    (folder / "a.txt").write_text(LINES * (150 + other))
    return ["--tokenizer", folder / "tiny-bert", "--data_files", folder / "a.txt"]


def task_source(folder: Path, other: bool) -> list:
    files = contents("mawps")
    files["fold4/dev.csv"] = files["fold4/dev.csv"].replace("9", "8" if other else "9", 1)
    return ["--source", write_files(folder, files)]


CASES = {
    "prepare": Case(prepare, "mine", text_source, "meta.json"),
    "prepare_pieces": Case(prepare_pieces, "mine", pieces_source, "meta.json"),
    "prepare_task": Case(prepare_task, "mawps", task_source, "fold4/dev.csv"),
}
TEXTS = ["prepare", "prepare_pieces"]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# folders that are there


def test_a_folder_is_prepared_once_and_replaced_by_force_only(case, run, refused, data_dir, tmp_path, monkeypatch):
    argv = case.argv(tmp_path / "source")
    folder, err = run(*argv)
    assert folder == data_dir / case.name and list(data_dir.iterdir()) == [folder] and err.splitlines()[0].startswith(f"prepared {folder}")
    assert folder.stat().st_mode == data_dir.stat().st_mode
    before, files = state(data_dir), files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(dataset.Dataset, "_install", None)
        assert run(*argv) == (folder, f"already prepared: {folder}\n")
    assert state(data_dir) == before
    other = case.argv(tmp_path / "other", other=True)
    assert refused(*other).endswith(": choose another --out, or replace it with --force")
    run(*other, "--force")
    assert files_of(folder).keys() == files.keys() and files_of(folder) != files and list(data_dir.iterdir()) == [folder]
    assert files_of(run(*other, "--out", tmp_path / "deep" / "out")[0]) == files_of(folder)


def test_a_damaged_or_incomplete_folder_is_refused_and_repaired_by_force(case, run, refused, data_dir, tmp_path):
    argv = case.argv(tmp_path / "source")
    folder, _ = run(*argv)
    files = files_of(folder)
    (folder / case.last).write_bytes(files[case.last][:-30])
    assert f"{folder / case.last}" in refused(*argv)
    (folder / case.last).unlink()
    assert f"{folder} holds {min(files_of(folder))} but no {case.last}: choose another --out, or replace it with --force" == refused(*argv)
    run(*argv, "--force")
    assert files_of(folder) == files


def test_a_folder_with_other_files_is_never_touched(case, refused, data_dir, tmp_path):
    argv = case.argv(tmp_path / "source")
    (data_dir / "own").mkdir()
    (data_dir / "own" / "thesis.txt").write_text("keep")
    (data_dir / "links").mkdir()
    (data_dir / "links" / "books").symlink_to(tmp_path)
    (data_dir / "file").write_text("keep")
    for out, fault in (
        ("own", f"own holds thesis.txt, which is not part of {case.name}: choose another --out, or move it"),
        ("links", f"links holds books, which is not part of {case.name}: choose another --out, or move it"),
        ("file", "file is a file, not a folder: choose another --out, or move it"),
        ("file/out", "file/out cannot be written (File exists): choose another --out, or fix this"),
    ):
        for force in ([], ["--force"]):
            assert refused(*argv, "--out", data_dir / out, *force).startswith(f"{data_dir / fault}")


def test_an_empty_folder_is_filled_and_a_link_to_a_folder_is_kept(case, run, data_dir, tmp_path):
    argv = case.argv(tmp_path / "source")
    (tmp_path / "disk").mkdir()
    (data_dir / case.name).symlink_to(tmp_path / "disk")
    for force in ([], ["--force"]):
        assert run(*argv, *force)[0] == data_dir / case.name
        assert case.last in files_of(tmp_path / "disk") and (data_dir / case.name).is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk", "source"]


def test_force_keeps_other_files_beside_a_prepared_text(run, data_dir, tmp_path):
    argv = CASES["prepare"].argv(tmp_path / "source")
    folder, _ = run(*argv)
    (folder / "notes").write_text("keep")
    run(*argv, "--force")
    assert (folder / "notes").read_text() == "keep" and "already" in run(*argv)[1]


def test_the_other_unit_under_the_same_name_is_refused(run, refused, tmp_path):
    folder = tiny.write_pieces(tmp_path / "data" / "pieces")
    assert refused(prepare, "pieces").startswith(f"{folder} has unit 'pieces', not 'bytes': ")


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("word", ["../up", "a/b", ".hidden", ""])
def test_names_that_cannot_be_folders_are_refused(name, word, refused, tmp_path):
    program, _, *options = CASES[name].argv(tmp_path / "source")
    assert "cannot be that of a folder" in refused(program, word, *options)


# failures


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("failing", [1, 5, "install"])
def test_interrupted_preparation_keeps_the_old_folder(case, failing, force, run, data_dir, tmp_path, monkeypatch):
    if force:
        run(*case.argv(tmp_path / "other", other=True))
    before, calls, fsync = state(data_dir), [], os.fsync

    def interrupted(*args: object) -> None:
        calls.append(args)
        if failing in ("install", len(calls)):
            raise KeyboardInterrupt
        fsync(*args)

    monkeypatch.setattr(*((dataset, "install") if failing == "install" else (os, "fsync")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*case.argv(tmp_path / "source"), *["--force"] * force, *([] if force else ["--out", data_dir / "new" / "out"]))
    assert state(data_dir) == before


@pytest.mark.parametrize("name", TEXTS)
def test_a_replacement_that_is_interrupted_is_not_accepted(name, run, data_dir, tmp_path, monkeypatch):
    def interrupted(old: Path, new: Path) -> None:
        if Path(new) == folder / "valid.bin":
            raise KeyboardInterrupt
        replace(old, new)

    folder, _ = run(*CASES[name].argv(tmp_path / "source"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*CASES[name].argv(tmp_path / "source"), "--force")
    with pytest.raises(UserError, match=r"no meta\.json"):
        Corpus.open(folder)
    assert list(data_dir.iterdir()) == [folder]


def test_what_killed_processes_left_is_removed_at_the_next_start(case, run, data_dir, tmp_path):
    """The folder that a running process builds stays, and so does that of another name."""
    argv = case.argv(tmp_path / "source")
    run(*argv)
    names = [f".{case.name}.0123abcd.tmp", f".{case.name}.4567abcd.tmp", f".{case.name}.89abcdef.old", f".{case.name}2.0123abcd.tmp"]
    for name in names:
        write_files(data_dir / name, {"deep/whole": "x"})
    with dataset.held(data_dir / names[1]) as free:
        assert free
        run(*argv)
        assert {path.name for path in data_dir.iterdir()} == {names[1], names[3], case.name}
    run(*argv)
    assert {path.name for path in data_dir.iterdir()} == {names[3], case.name}


def test_a_folder_whose_replacement_was_killed_is_put_back(case, run, data_dir, tmp_path):
    argv = case.argv(tmp_path / "source")
    folder, _ = run(*argv)
    files = files_of(folder)
    folder.rename(data_dir / f".{case.name}.0123abcd.old")
    assert run(*argv)[1] == f"already prepared: {folder}\n"
    assert files_of(folder) == files and list(data_dir.iterdir()) == [folder]


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out", "n" * 300, "n" * 250, "new/" + "n" * 300 + "/out", "circle", "circle/out"])
def test_a_place_that_cannot_be_written(out, case, refused, data_dir, tmp_path):
    (data_dir / "circle").symlink_to(data_dir / "circle")
    for force in ([], ["--force"]):
        line = refused(*case.argv(tmp_path / "source"), "--out", data_dir / out, *force)
        assert line.startswith(f"{data_dir / out} cannot be written (") and line.endswith("): choose another --out, or fix this")


@pytest.mark.parametrize("largest", [100, 250])
def test_a_disk_that_takes_no_more(largest, case, run, refused, data_dir, tmp_path):
    """The system refuses files of more bytes; what stands there stays."""
    run(*case.argv(tmp_path / "other", other=True))
    argv = case.argv(tmp_path / "source")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        line = refused(*argv, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"{data_dir / case.name} cannot be written (")


@pytest.mark.parametrize("same", [True, False])
def test_two_processes_may_prepare_the_same(same, case, run, data_dir, tmp_path, monkeypatch):
    def slower(built: Path, out: Path) -> None:
        shutil.copytree(built, out)
        if not same:
            (out / case.last).write_text("{")
        os.rename(built, out)  # fails, since the folder is not empty

    monkeypatch.setattr(dataset, "install", slower)
    if same:
        assert run(*case.argv(tmp_path / "source")) == (data_dir / case.name, f"already prepared: {data_dir / case.name}\n")
    else:
        with pytest.raises(UserError, match=case.last):
            run(*case.argv(tmp_path / "source"))
    assert [path.name for path in data_dir.iterdir()] == [case.name]


def test_a_full_disk_is_reported(case, refused, tmp_path, monkeypatch):
    argv = case.argv(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=documents.SPACE_MARGIN + 100))
        assert "MB are needed: make room, or choose another --out" in refused(*argv)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(*argv) == "x cannot be used (No space left on device): fix that, or give another"


def test_a_packed_text_that_fills_the_disk_is_reported(refused, tmp_path, monkeypatch):
    (tmp_path / "b.xz").write_bytes(lzma.compress(b"ab" * 50_000))  # its size is known only once it is unpacked
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=documents.SPACE_MARGIN + 20_000))
    assert "MB are needed" in refused(prepare, "mine", "--source", tmp_path / "b.xz")


def test_a_terminated_process_leaves_nothing(tmp_path):
    (tmp_path / "long.gz").write_bytes(gzip.compress(bytes(4_000_000), 1) * 100)
    argv = [sys.executable, str(ROOT / "data" / "prepare.py"), "mine", "--source", "long.gz", "--out", "a/out"]
    command = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob("a/.out.*.tmp/whole")):
        assert command.poll() is None and time.monotonic() < end, command.communicate()
        time.sleep(0.002)
    command.send_signal(signal.SIGTERM)
    assert command.communicate() == ("", "stopped by SIGTERM\n") and command.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["long.gz"]


# the commands


CALLS = """
import contextlib, io, json, runpy, sys
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
assert not {"torch", "transformers", "datasets"} & sys.modules.keys()
"""


def test_the_commands_as_processes(case, run, tmp_path):
    """Exit codes, stdout and stderr. Refusals and a second run need no torch, transformers or datasets, so that they are quick."""
    argv = case.argv(tmp_path / "source")
    run(*argv, "--out", tmp_path / "out")
    write_files(tmp_path / "own", {"thesis.txt": "keep"})
    script, words = str(ROOT / "data" / f"{case.program.__name__.rpartition('.')[2]}.py"), [str(word) for word in argv[1:]]
    calls = [[*words, "--out", "out"], [*words, "--out", "own"], [*words, "--no_such_option"], ["--help"]]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps([[script, *call] for call in calls])], cwd=tmp_path, capture_output=True, text=True
    )
    again, refusal, unknown, usage = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and again == [0, "out\n", "already prepared: out\n"]
    assert refusal[:2] == [2, ""] and refusal[2].startswith("error: own holds thesis.txt, ") and refusal[2].count("\n") == 1
    assert (
        unknown[:2] == [2, ""]
        and unknown[2].startswith("error: ")
        and unknown[2].count("\n") == 1
        and usage[0] == 0
        and "--force" in usage[1]
    )
