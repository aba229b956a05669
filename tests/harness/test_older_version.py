"""Runs and surgery folders of version 0.1 load, resume and give the same numbers.

On the CPU and torch version that made them the numbers must be bit-identical; elsewhere matrix products may round differently.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from utils.checkpoints.origin import open_source

DATA = Path(__file__).parent / "data" / "run-0.1"
MADE = json.loads((DATA / "run" / "env.json").read_text())[0]
SIZES = {
    "n_layer": 1,
    "n_head": 2,
    "d_head": 4,
    "d_model": 8,
    "d_ff": 16,
    "batch_size": 2,
    "max_step": 12,
    "log_interval": 3,
    "eval_interval": 6,
}
ON_CPU = ["--device", "cpu", "--threads", "1"]


@pytest.fixture
def folder(tmp_path):
    """A copy of the data in which the relative paths of the runs are valid."""
    return shutil.copytree(DATA, tmp_path / "data")


def execute(program: str, *arguments: str, folder: Path) -> tiny.Finished:
    return tiny.completed(list(arguments), before=partial(os.chdir, folder), program=program)


def made_here(environment: dict) -> bool:
    """Return whether the data was made on this kind of machine."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and all(environment[name] == MADE[name] for name in ("device_name", "torch"))


def assert_same(ours: list[dict], theirs: list[dict], exact: bool) -> None:
    """Rows of numbers and words. exact: to the last bit; otherwise numbers to a relative error of 1e-5."""
    close = [{name: value if isinstance(value, str) else pytest.approx(value, rel=1e-5) for name, value in row.items()} for row in theirs]
    assert ours == (theirs if exact else close)


def test_resumed_run_ends_with_the_same_numbers_and_weights(folder):
    run = folder / "run"
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "result.json").unlink()
    execute("train.py", *tiny.flags(Path("text"), Path("run"), method="smoe_dropout", **SIZES), folder=folder)
    exact = made_here(tiny.read_json(run / "env.json")["starts"][-1])
    assert_same(tiny.metrics(run), tiny.metrics(DATA / "run"), exact)
    assert_same(*(tiny.quality(tiny.read_json(path / "result.json")) for path in (run, DATA / "run")), exact)
    for path in (DATA / "run" / "checkpoints" / "step-00000012").glob("*.safetensors"):
        ours, theirs = load_file(run / "checkpoints" / "step-00000012" / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) if exact else torch.allclose(ours[name].float(), tensor.float(), atol=1e-4), name


def test_evaluation_gives_the_recorded_quality(folder):
    said = execute("train.py", "--eval_only", "--work_dir", "run", folder=folder).err
    assert all(f"note: run/{name} has no checksum" in said for name in ("config.json", "result.json"))
    recorded = {row["k"]: row for row in tiny.quality(tiny.read_json(folder / "run" / "result.json"))}
    found = tiny.quality(tiny.read_json(folder / "run" / "eval.json"))
    assert len(found) == 3
    for row in found:
        assert row == pytest.approx({name: recorded[row["k"]][name] for name in row}, rel=1e-6)


def test_other_programs_read_the_run(folder):
    tiny.write_rows(folder / "sst2", "sst2")
    tuning = ["--task", "sst2", "--data", "sst2", "--max_step", "2", "--eval_interval", "2", "--log_interval", "1", "--batch_size", "4"]
    execute("finetune.py", *tuning, "--checkpoint", "run", "--work_dir", "tuned", *ON_CPU, folder=folder)
    assert (folder / "tuned" / "result.json").exists()
    assert execute("generate.py", "--checkpoint", "run", "--prompt", "the ", "--length", "3", folder=folder).out.startswith("the ")
    execute("surgery.py", "--from", "run", "--method", "drop", "--keep", "2", "--tokens", "64", "--out", "dropped", *ON_CPU, folder=folder)
    assert (folder / "dropped" / "surgery.json").exists()


def test_surgery_folder_with_a_renamed_method_is_read(folder):
    """Version 0.1 called `keep_best` "slim"."""
    assert open_source(folder / "slim").operations[-1]["method"] == "keep_best"
    training = ["--max_step", "2", "--eval_interval", "2", "--log_interval", "1", *ON_CPU]
    execute("train.py", "--start_from", "slim", "--work_dir", "recovered", *training, folder=folder)
    assert '"method": "keep_best"' in (folder / "recovered" / "result.json").read_text()
