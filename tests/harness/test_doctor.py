"""The doctor: it finds a folder of every kind intact, and names the file that was damaged, with a remedy."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from smoe_dropout.io import save_model
from tests import tiny
from tests.conftest import ROOT
from utils import doctor
from utils.models.build import build_model

KINDS = {"run": "a finished run", "smaller": "a folder of surgery.py", "words": "a prepared text", "sst2": "the rows of a task"}
KINDS |= {"saved": "a saved model", "record.json": "a record", "run/checkpoints/step-00000008": "a checkpoint"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    words = tiny.write_corpus(root / "words")
    arguments = tiny.flags(words, root / "run", method="smoe", max_step=8, eval_interval=4)
    tiny.completed(arguments)
    operation = ["--from", root / "run", "--method", "merge", "--keep", 2, "--tokens", 64, "--out", root / "smaller"]
    tiny.completed([str(word) for word in operation], program="surgery.py")
    tiny.write_rows(root / "sst2", "sst2")
    save_model(build_model(tiny.parse(arguments), None), root / "saved")
    shutil.copy(next((ROOT / "results" / "table1" / "smoe").glob("*.json")), root / "record.json")
    return root


def examine(path: Path, capsys) -> tuple[int, str]:
    """Exit code and output."""
    code = doctor.main([str(path)])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", KINDS)
def test_an_intact_folder(world, name, capsys):
    code, said = examine(world / name, capsys)
    verdict = "intact, as far as it can be verified" if name == "sst2" else "intact"  # rows made by hand have no checksum
    assert code == 0 and said.startswith(f"{world / name}: {KINDS[name]}\n") and f"\n{world / name}: {verdict}\n" in said, said


def test_the_committed_records_are_intact(capsys):
    code, said = examine(ROOT / "results", capsys)
    assert code == 0 and "a folder of records" in said and len(said.splitlines()) == 3


def flip(path: Path) -> None:
    """Changes a bit in the middle. One of the last digit of a number may leave its value as it is: then one further on."""
    content = path.read_bytes()
    for at in range(len(content) // 2, len(content)):
        changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        if path.suffix != ".json" or value_of(changed) != value_of(content):
            path.write_bytes(changed)
            return


def value_of(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nested": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
}
# what a kill leaves of tensorboard's events, and files without which a folder is one of an earlier version, which had no checksum
HARMLESS = {("events", "cut"), ("events", "missing"), ("events", "nested"), (".lock", "cut"), (".lock", "missing"), (".lock", "nested")}
HARMLESS |= {(".lock", "flipped"), (".lock", "a pipe"), (".lock", "a folder"), ("manifest.json", "missing")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_a_remedy(world, damage, tmp_path, capsys):
    for folder in ("run", "smaller", "words", "saved"):
        for path in [path.relative_to(world) for path in sorted((world / folder).rglob("*")) if path.is_file()]:
            step = path.parent.name if "checkpoints" in path.parts else None  # a checkpoint is one part
            if step is None and (path.name.partition(".out.")[0], damage) in HARMLESS:
                continue
            shutil.copytree(world / folder, tmp_path / folder)
            DAMAGES[damage](tmp_path / path)
            code, said = examine(tmp_path / folder, capsys)
            line = next((line for line in said.splitlines()[1:] if (step or path.name) in line), said)
            line = said if path == Path("saved/manifest.json") else line  # a wrong hash in it is reported of the file
            assert code == 1 and (": damaged" in line or "missing: " in line), (path, said)
            shutil.rmtree(tmp_path / folder)


def test_leftovers_are_reported_and_harmless(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    for name in (".config.json.partial", "checkpoints/.step-00000012.partial", "checkpoints/.step-00000004.removed"):
        (tmp_path / "run" / name).mkdir()
    code, said = examine(tmp_path / "run", capsys)
    assert code == 0 and said.count("left by an interrupted process") == 3


def test_a_missing_checkpoint_is_reported(world, tmp_path, capsys):
    for folder, step in (("run", 8), ("smaller", 0)):
        shutil.copytree(world / folder, tmp_path / folder)
        shutil.rmtree(tmp_path / folder / "checkpoints" / f"step-{step:08d}")
        code, said = examine(tmp_path / folder, capsys)
        assert code == 1 and ("step-00000000: missing: " in said or "its weights, of step 8, are not intact" in said), said


@pytest.mark.parametrize(
    ("name", "content", "kind", "fault"),
    [
        ("a.json", b"{}", "a record", "a.json: damaged: "),
        ("config.json", b'{"model_type": "bert"}', "a saved model", "model.safetensors: missing"),
        ("config.json", b"{", "a saved model", "config.json: damaged: "),
        ("smoe_config.json", b"{}", "a saved model", "model.safetensors: missing"),
        ("smoe_config.json", b"\xff\xfe", "a saved model", "smoe_config.json: damaged: "),
    ],
)
def test_what_is_not_intact(name, content, kind, fault, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    code, said = examine(tmp_path / name if kind == "a record" else tmp_path, capsys)
    assert code == 1 and f": {kind}\n" in said and fault in said and "damaged: is damaged" not in said, said


def test_a_run_in_use_is_reported(world, capsys):
    with open(world / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by a process" in examine(world / "run", capsys)[1]
    assert "in use" not in examine(world / "run", capsys)[1]


def test_an_unfinished_run_says_how_to_resume_it(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    code, said = examine(tmp_path / "run", capsys)
    assert code == 1 and said.startswith(f"{tmp_path / 'run'}: an unfinished run") and "run its command again" in said


def test_files_of_another_run_do_not_belong(world, tmp_path, capsys):
    tiny.completed(tiny.flags(world / "words", tmp_path / "other", method="smoe", max_step=8, eval_interval=4, seed=7))
    for name in ("config.json", "env.json", "result.json", "metrics.jsonl", "checkpoints/step-00000008"):
        shutil.copytree(world / "run", tmp_path / "run")
        place = tmp_path / "run" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        (shutil.copytree if (tmp_path / "other" / name).is_dir() else shutil.copy)(tmp_path / "other" / name, place)
        code, said = examine(tmp_path / "run", capsys)
        assert code == 1 and ": damaged" in said, name
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch, lambda path: path.symlink_to(path)])
def test_other_paths_are_refused(make, tmp_path, capsys):
    make(tmp_path / "other")
    assert doctor.main([str(tmp_path / "other")]) == 2
    assert f"error: {tmp_path / 'other'}" in capsys.readouterr().err
