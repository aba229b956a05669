"""Scripts of Table 2: one per task, the model and method being the checkpoint's, the two official ones, and the runner of all rows."""

import json

import pytest

from smoe_dropout.registry import METHODS
from tests import tiny
from tests.conftest import ROOT
from tests.scripts.test_scripts import bash, copy_of_the_repository
from utils.data.rows import TASKS

TABLE = ROOT / "script" / "table2"
ROWS = ("dense", "smoe", "thor", "smoe_dropout")
pytestmark = pytest.mark.skipif(not set(ROWS) <= set(METHODS), reason="a method of the table is missing")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Finished tiny runs by model and method."""
    folder, runs = tmp_path_factory.mktemp("trained"), {}

    def run(method: str, model: str = "transformer_xl"):
        if (model, method) not in runs:
            text, changes = folder / f"text-{model}", {"method": method, "seed": 1, "max_step": 2, "eval_interval": 2}
            if not text.exists():
                (tiny.write_corpus if model == "transformer_xl" else tiny.write_pieces)(text)
            changes |= {} if model == "transformer_xl" else {**tiny.ENCODER, "model": model, "max_step": 2}
            runs[model, method] = folder / model / f"{method}-seed1"
            tiny.completed(tiny.flags(text, runs[model, method], **changes))
        return runs[model, method]

    return run


def test_every_task_has_its_script():
    found = {path.stem for path in TABLE.glob("*.sh")}
    assert found == {*TASKS, "run_all"}
    for task in TASKS:
        assert (TABLE / f"{task}.sh").read_text().splitlines()[-1] == f'finetune {task} "$@"'
    assert {path.name for path in (TABLE / "sst2").iterdir()} == {"dense_model.sh", "smoe_dropout.sh"}


@pytest.mark.parametrize("task", [*TASKS, "sst2/smoe_dropout", "sst2/dense_model"])
def test_a_missing_checkpoint_is_refused(task, tmp_path):
    path = TABLE / f"{task}.sh"
    for words in ((), ("--lr", "1")):
        done = bash(path, *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: usage: bash ") and "CHECKPOINT" in done.stderr
    done = bash(path, tmp_path / "missing", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: the checkpoint {tmp_path / 'missing'} does not exist")


@pytest.mark.parametrize(("model", "task"), [("transformer_xl", "sst2"), ("transformer_xl", "mawps"), ("bert", "sst2")])
def test_settings_of_the_task_and_the_checkpoint_are_printed(model, task, trained, tmp_path):
    """As published for SST-2 from Transformer-XL; AdamW and linear decay for the encoders. The rows are missing, so nothing is trained."""
    done = bash(TABLE / f"{task}.sh", trained("smoe", model), "--preset", "paper", "--data", tmp_path / "missing")
    optimiser = {"transformer_xl": "adam, lr 0.0001, cosine", "bert": "adamw, lr 2e-05, linear"}[model]
    assert done.stdout == f"settings: {model}, preset paper: 5,000 steps, batch 16, {optimiser}\n"
    assert done.returncode == 2 and str(tmp_path / "missing") in done.stderr


@pytest.mark.parametrize(("script", "wrong", "right"), [("smoe_dropout", "smoe", "smoe_dropout"), ("dense_model", "smoe", "dense")])
def test_official_scripts_refuse_other_methods(script, wrong, right, trained, tmp_path):
    path, rows = TABLE / "sst2" / f"{script}.sh", tmp_path / "missing"
    done = bash(path, trained(wrong), "--data", rows)
    assert done.returncode == 2 and f"--method {wrong}" in done.stderr and not done.stdout
    done = bash(path, trained(right), "--data", rows)
    assert done.stdout.startswith("settings: transformer_xl") and str(rows) in done.stderr


def test_folds_cannot_share_a_folder(trained, tmp_path):
    rows = tiny.write_rows(tmp_path / "mawps", "mawps")
    done = bash(TABLE / "mawps.sh", trained("dense"), "--data", rows, "--work_dir", tmp_path / "run")
    assert done.returncode == 2 and "select one with --fold" in done.stderr and not (tmp_path / "run").exists()


def test_every_fold_is_fine_tuned_unless_one_is_selected(trained, tmp_path):
    copy = copy_of_the_repository(tmp_path / "copy")
    (copy / "finetune.py").write_text("import sys; print('finetune', *sys.argv[1:])\n")
    rows = tiny.write_rows(tmp_path / "mawps", "mawps")
    words = ("script/table2/mawps.sh", trained("dense"), "--data", rows)
    folds = [line.split("--fold ")[1] for line in bash(*words, cwd=copy).stdout.splitlines()[1:]]
    assert folds == list("01234")
    assert bash(*words, "--fold", "3", cwd=copy).stdout.splitlines()[1].endswith("--fold 3")


def test_run_all_of_table2_resumes(trained, tmp_path):
    """Two methods, one of them tuned at E and at E/2, on one fold of MAWPS; then a row from random weights is added."""
    copy = copy_of_the_repository(tmp_path / "copy")
    tiny.write_rows(copy / "data" / "mawps", "mawps")
    (copy / "pretrained").mkdir()
    for run in ("dense", "smoe_dropout"):
        (copy / "pretrained" / f"{run}-seed1").symlink_to(trained(run))
    short = ("--max_step", "4", "--batch_size", "4", "--eval_interval", "4", "--log_interval", "4", "--device", "cpu")
    how = {"TASKS": "mawps", "FOLDS": "2", "SEEDS": "1 2", "JOBS": "2"}
    assert bash("script/table2/run_all.sh", cwd=copy).returncode == 2
    refused = bash("script/table2/run_all.sh", "pretrained", "--seed", "3", cwd=copy)
    assert refused.returncode == 2 and "--seed differs from row to row" in refused.stderr
    empty = bash("script/table2/run_all.sh", "script", cwd=copy)
    assert empty.returncode == 2 and "no finished run" in empty.stderr
    first = bash("script/table2/run_all.sh", "pretrained", *short, cwd=copy, **how)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3 rows: 0 finished, 3 to run, 2 at a time" in first.stdout and "(rows left: 0)" in first.stdout
    results = {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("result.json")}
    configs = [json.loads((path.parent / "config.json").read_text()) for path in results]
    assert all(config["fold"] == 2 for config in configs) and sorted(config["moe_top_k"] or 0 for config in configs) == [0, 2, 4]
    assert "folds 2" not in first.stdout and "fold 2 of 5" in first.stdout and first.stdout.count("(n = 1)") == 3
    assert "SMoE-Dropout, k tuned at E/2" in first.stdout
    again = bash("script/table2/run_all.sh", "pretrained", *short, cwd=copy, METHODS="dense", SCRATCH="1", **how)
    assert again.returncode == 0 and again.stdout.count("this run is complete") == 1
    assert "2 rows: 1 finished, 1 to run" in again.stdout and "(rows left: 0)" in again.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert len(list((copy / "runs").rglob("Figs/**/*.png"))) >= 1
