"""The bash scripts: sound syntax, one row each, flags passed on, and every flag of theirs known."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS
from tests import tiny
from tests.conftest import ROOT

ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # scripts find the Python of the tests
SCRIPTS = sorted((ROOT / "script").rglob("*.sh"))
FOLDERS = ("table1", "figure5", "ablation")
RUNS = [path for path in SCRIPTS if path.relative_to(ROOT / "script").parts[0] in FOLDERS and path.name != "run_all.sh"]
ENCODERS = [path for path in RUNS if path.parent.name in ("bert", "roberta")]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.name == "common.sh" or os.access(path, os.X_OK)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_passes_flags_on_and_refuses_wrong_ones(path, tmp_path):
    """From another folder; a wrong flag is answered before data are looked for."""
    done = subprocess.run(["bash", path, "--lr", "-1", "--preset", "laptop"], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --lr -1.0 must be positive")
    missing = tmp_path / "nothing"
    done = subprocess.run(["bash", path, "--data", missing], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2
    assert str(missing) in done.stderr


def started(path: Path) -> Path:
    """The script itself, or where its row is another table's, too, that table's."""
    other = re.search(r"^exec bash (\S+)", path.read_text(), re.MULTILINE)
    return ROOT / other[1] if other else path


def flags_of(path: Path):
    from tests.tiny import parse

    return parse(started(path).read_text().split("\npretrain ")[1].replace('"$@"', "").split())


@pytest.mark.parametrize("path", [path for path in RUNS if path not in ENCODERS], ids=name)
def test_flags_of_the_script(path):
    """The command of each script is one that the flags accept, at paper scale."""
    flags = flags_of(path)
    assert (flags.d_model, flags.tgt_len, flags.max_step, flags.preset) == (256, 512, 400_000, "paper")
    assert flags.d_ff == 8192
    assert flags.d_inner == (8192 // flags.moe_num_expert if flags.moe else 8192)
    run = {"directly_dense_training": "dense_dropout"}.get(path.stem, started(path).stem)
    depth = 4
    if path.parent.name == "figure5":
        depth, method, first_four = re.fullmatch(r"(\d+)layers_(dense|smoe_dropout)(_first_four)?", path.stem).groups()
        run = run if depth == "4" else f"{method}-{depth}layers{'-first4' if first_four else ''}"
    assert flags.work_dir == f"runs/paper/enwik8/{run}-seed1111"
    assert flags.n_layer == int(depth)


def test_no_two_rows_share_a_folder():
    """But those that are the same run, so that no row takes another's result for its own."""
    paths = {started(path) for path in RUNS if path.stem != "directly_dense_training"}
    assert len({flags_of(path).work_dir for path in paths}) == len(paths)


@pytest.mark.parametrize("path", ENCODERS, ids=name)
def test_flags_of_the_scripts_for_encoders(path):
    """Base size with the feed-forward width doubled, and the paper's optimiser, batch and length."""
    flags, model = flags_of(path), path.parent.name
    assert (flags.model, flags.method, flags.preset) == (model, path.stem, "paper")
    assert (flags.n_layer, flags.d_model, flags.d_ff, flags.d_inner) == (12, 768, 6144, 384 if flags.moe else 6144)
    assert (flags.optim, flags.scheduler, flags.lr, flags.batch_size, flags.max_step) == ("adamw", "linear", 5e-5, 64, 100_000)
    assert (
        flags.work_dir == f"runs/paper/{model}/bookcorpus-{'bert-base-uncased' if model == 'bert' else 'roberta-base'}/{path.stem}-seed1111"
    )


def test_both_encoders_have_the_same_rows():
    rows = {model: {path.stem for path in ENCODERS if path.parent.name == model} for model in ("bert", "roberta")}
    assert rows["bert"] == rows["roberta"] >= {"dense", "dense_dropout", "concrete_dropout", "dropblock", "smoe", "thor", "smoe_dropout"}


def test_every_method_has_its_script():
    """By its name; scripts of the same method differ in what they add."""
    commands = {path.stem: path.read_text().split("--method ")[1].split()[0] for path in RUNS if path.parent.name == "table1"}
    assert set(METHODS) == set(commands.values()) and all(commands[method] == method for method in METHODS)


def test_run_all_goes_on_where_it_was(tmp_path):
    """In a copy of the tree with three rows, two seeds each: a failure is said and passed over, finished runs are left alone."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", "runs", "data", ".venv", "__pycache__", "results", "Figs")
    shutil.copytree(ROOT, copy, ignore=ignore)
    (copy / "results").mkdir()
    shutil.copy(ROOT / "results" / "published.json", copy / "results")
    for path in (copy / "script" / "table1").glob("*.sh"):
        if path.stem not in ("run_all", "dense", "smoe", "thor"):
            path.unlink()
    corpus = tiny.write_corpus(tmp_path / "words")
    sizes = tiny.flags(corpus, tmp_path / "unused", dataset="words")
    where = sizes.index("--work_dir")
    words = ["bash", "script/table1/run_all.sh", *sizes[:where], *sizes[where + 2 :]]

    def run(*more: str):
        return subprocess.run([*words, *more], cwd=copy, capture_output=True, text=True, env={**ENV, "JOBS": "2", "SEEDS": "1 2"})

    assert run("--seed", "3").returncode == 2 and not (copy / "runs").exists()
    broken = copy / "script" / "table1" / "smoe.sh"
    whole = broken.read_text()
    broken.write_text(whole.replace('"$@"', '"$@" --lr -1'))
    first = run()
    assert first.returncode == 1 and first.stdout.count("FAILED: error: --lr -1.0 must be positive") == 2
    broken.write_text(whole)
    results = {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("result.json")}
    assert len(results) == 4
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(list((copy / "runs").rglob("result.json"))) == 6 and list((copy / "runs").rglob("Figs/slimmable*.png"))
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert second.stdout.count("(n = 2)") == 3 and second.stdout.count("this run is complete") == 4
