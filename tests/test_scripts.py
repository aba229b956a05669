"""The bash scripts: sound syntax, one row each, flags passed on, and every flag of theirs known."""

import json
import os
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "script").rglob("*.sh"))
RUNS = [path for path in SCRIPTS if path.parent.name in ("table1", "figure5")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.name == "common.sh" or os.access(path, os.X_OK)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_passes_flags_on_and_refuses_wrong_ones(path, tmp_path):
    """From another folder; a wrong flag is answered before data are looked for."""
    done = subprocess.run(["bash", path, "--lr", "-1", "--preset", "laptop"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --lr -1.0 must be positive")
    missing = tmp_path / "nothing"
    done = subprocess.run(["bash", path, "--data", missing], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(missing) in done.stderr


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_flags_of_the_script(path):
    """The command of each script is one that the flags accept, at paper scale."""
    from utils.command_line import parse

    words = path.read_text().split("\npretrain ")[1].replace('"$@"', "").split()
    flags = parse(words)
    assert (flags.d_model, flags.tgt_len, flags.max_step, flags.preset) == (256, 512, 400_000, "paper")
    assert flags.d_ff == 8192
    assert flags.d_inner == (512 if flags.moe else 8192)
    assert json.dumps(flags.work_dir)
    assert flags.n_layer == (int(path.stem.split("layers")[0]) if path.parent.name == "figure5" else 4)
