"""Scripts of surgery: the runner of all rows and what it starts."""

import re

from smoe_dropout.registry import SURGERIES
from tests import tiny
from tests.conftest import ROOT
from tests.scripts.test_scripts import bash, copy_of_the_repository


def test_run_all_operates_and_renders_the_table(tmp_path):
    """From one run: an operation and its baselines, on the text and fine-tuned."""
    copy = copy_of_the_repository(tmp_path / "copy")
    presets = copy / "utils" / "flags" / "presets.py"
    # steps of fine-tuning, for which there is no flag: --max_step differs from row to row
    presets.write_text(presets.read_text().replace('"max_step": 400,', '"max_step": 4,'))
    text = tiny.write_corpus(copy / "words")
    tiny.completed(tiny.flags(text, copy / "trained" / "smoe-seed1", method="smoe", max_step=4, eval_interval=2))
    tiny.write_rows(copy / "data" / "sst2", "sst2")
    short = ("--batch_size", "4", "--eval_batch_size", "2", "--device", "cpu", "--threads", "1")
    how = {"METHODS": "drop", "KEEP": "2", "STEPS": "2", "SCRATCH": "1", "JOBS": "1"}
    refused = bash("script/surgery/run_all.sh", "trained", "--max_step", "3", cwd=copy)
    assert refused.returncode == 2 and "--max_step differs from row to row" in refused.stderr
    assert bash("script/surgery/run_all.sh", cwd=copy).returncode == 2
    done = bash("script/surgery/run_all.sh", "trained", *short, cwd=copy, **how)
    logs = {path.name: path.read_text() for path in (copy / "runs" / "quick" / "surgery" / "logs").glob("*.log")}
    assert done.returncode == 0, (done.stderr, logs)
    assert "3 rows: 0 finished, 3 to run, 1 at a time" in done.stdout and "(rows left: 0)" in done.stdout
    assert sorted(logs) == ["smoe-seed1-drop-2.log", "smoe-seed1-scratch-2.log", "smoe-seed1-whole-0.log"]
    on_task, on_text = [line.split(" | ") for line in done.stdout.splitlines() if re.match(r"\| drop 4 to 2(, taught)? \(n = 1\) \|", line)]
    assert "drop 4 to 2, taught" in on_text[0], "as MC-SMoE recovers"
    assert "–" not in (on_task[2], on_task[5], on_text[2], on_text[5]), "before, and from scratch at that size"
    assert on_task[3] == "–" != on_text[3], "a task has no quality directly after"


def test_run_all_covers_every_operation():
    text = (ROOT / "script" / "surgery" / "run_all.sh").read_text()
    assert {*re.search(r"METHODS:-([\w ]+)}", text)[1].split()} == {*SURGERIES, "compress"}


def test_rows_need_a_run():
    for script, usage in (("row", "RUN METHOD KEEP SEED"), ("scratch", "RUN KEEP")):
        done = bash(f"script/surgery/{script}.sh")
        assert done.returncode == 2 and done.stderr.startswith("error: usage: bash ") and usage in done.stderr
