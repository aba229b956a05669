"""The scripts of the transfer tasks: one for every model, task and method, which starts from the checkpoint it is given."""

import os
import shutil
import subprocess
from itertools import product

import pytest

from smoe_dropout.registry import METHODS
from tests import tiny
from tests.conftest import ROOT
from tests.scripts.test_scripts import ENV
from utils.data.rows import TASKS

TABLE = ROOT / "script" / "table2"
ROWS = {"dense_model": "dense", "smoe": "smoe", "thor": "thor", "smoe_dropout": "smoe_dropout"}
MODELS = {"transformer_xl": TABLE, "bert": TABLE / "bert", "roberta": TABLE / "roberta"}
pytestmark = pytest.mark.skipif(not set(ROWS.values()) <= set(METHODS), reason="a method of the table is not here")


def bash(*words, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, capture_output=True, text=True, env={**ENV, **environment})


@pytest.mark.parametrize(("model", "task", "row"), list(product(MODELS, TASKS, ROWS)))
def test_every_row_has_its_script(model, task, row):
    words = (MODELS[model] / task / f"{row}.sh").read_text().splitlines()[-1].split()
    assert words == ["finetune", model, task, ROWS[row], '"$@"']


def test_there_are_no_other_scripts():
    found = {path.relative_to(TABLE) for path in TABLE.rglob("*.sh")}
    assert len(found) == len(MODELS) * len(TASKS) * len(ROWS) + 1 and any(path.name == "run_all.sh" for path in found)


@pytest.mark.parametrize(
    "path", [TABLE / "sst2" / "smoe_dropout.sh", TABLE / "bert" / "mawps" / "dense_model.sh"], ids=lambda path: path.stem
)
def test_a_checkpoint_is_asked_for_and_looked_at_first(path, tmp_path):
    for words in ((), ("--lr", "1")):
        done = bash(path, *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: usage: bash ") and "CHECKPOINT" in done.stderr
    done = bash(path, tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: the checkpoint {tmp_path / 'nothing'} is not there")


def test_five_folds_cannot_share_a_folder(tmp_path):
    run, rows = pretrained(tmp_path, "dense", 1), tiny.write_rows(tmp_path / "mawps", "mawps")
    done = bash(TABLE / "mawps" / "dense_model.sh", run, "--data", rows, "--work_dir", tmp_path / "run")
    assert done.returncode == 2 and "choose one with --fold" in done.stderr and not (tmp_path / "run").exists()


def pretrained(folder, method: str, seed: int):
    run = folder / "pretrained" / f"{method}-seed{seed}"
    words = folder / "words"
    if not words.exists():
        tiny.write_corpus(words)
    tiny.completed(tiny.flags(words, run, method=method, seed=seed, max_step=2, eval_interval=2))
    return run


def test_run_all_fine_tunes_what_is_there_and_goes_on(tmp_path):
    """In a copy of the tree: two methods, one of them with a second seed, one fold of MAWPS, and from random weights."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "data", ".venv", "__pycache__", "results", "Figs"))
    (copy / "results").mkdir()
    shutil.copy(ROOT / "results" / "published.json", copy / "results")
    tiny.write_rows(copy / "data" / "mawps", "mawps")
    runs = [pretrained(copy, "dense", 1), pretrained(copy, "smoe_dropout", 1), pretrained(copy, "smoe_dropout", 2)]
    short = ("--max_step", "4", "--batch_size", "4", "--eval_interval", "4", "--log_interval", "4", "--device", "cpu")
    how = {"TASKS": "mawps", "FOLDS": "2", "SCRATCH": "1", "SEEDS": "1 2", "JOBS": "2"}
    assert bash("script/table2/run_all.sh", cwd=copy).returncode == 2
    refused = bash("script/table2/run_all.sh", "pretrained", "--seed", "3", cwd=copy)
    assert refused.returncode == 2 and "--seed differs from row to row" in refused.stderr
    empty = bash("script/table2/run_all.sh", "script", cwd=copy)
    assert empty.returncode == 2 and "no finished run" in empty.stderr
    first = bash("script/table2/run_all.sh", "pretrained", *short, cwd=copy, **how)
    assert first.returncode == 0, first.stdout + first.stderr
    results = {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("result.json")}
    assert len(results) == len(runs) * 2
    assert "SMoE-Dropout (from_scratch=True) (n = 2)" in first.stdout and "folds 2" not in first.stdout and "fold 2 of 5" in first.stdout
    again = bash("script/table2/run_all.sh", "pretrained", *short, cwd=copy, **how)
    assert again.returncode == 0 and again.stdout.count("this run is complete") == len(results)
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert len(list((copy / "runs").rglob("Figs/by_k_*.png"))) == 1


def test_a_script_is_executable():
    assert all(os.access(path, os.X_OK) for path in TABLE.rglob("*.sh"))
