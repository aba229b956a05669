"""A method is one deletable file and a registry line: without them everything else works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS
from tests.conftest import ROOT

LEFT_OUT = {"data", "runs"}  # texts and results of runs: large, and no part of the program
FILES = ("tests/pages/test_structure.py", "tests/library/test_contract.py")  # of the latter what is quick
DELETED = [name for name in ("thor", "competesmoe", "concrete_dropout") if name in METHODS]

# each remaining method as on the command line; then a model of each, by the library
PROBE = """
import io, json, runpy, sys
from contextlib import redirect_stdout
methods = sys.argv[1:]
parsed = {}
for method in methods:
    sys.argv = ["utils.cli.train", "--preset", "quick", "--method", method]
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_module("utils.cli.train", run_name="__main__", alter_sys=True)
    parsed[method] = json.loads(printed.getvalue())

import torch
import smoe_dropout as sd
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.methods.base import Forward, Settings
from smoe_dropout.registry import METHODS, load
assert list(METHODS) == methods
ran = []
for name in methods:
    method = load(METHODS, "method", name)
    model = MemTransformerLM(TransformerXLConfig(n_token=16, n_layer=2, n_head=2, d_model=16, d_head=8, d_inner=32))
    if method.sparse:
        config = sd.SMoEConfig(num_experts=4, top_k=2, router=method.flags["gate_name"], method=name if method.layer else None)
        model = sd.moefy(model, config)
        assert len(sd.moe_layers(model)) == 2
    elif method.convert:
        model = method.convert(model, method.options())
    tokens = torch.arange(12).view(2, 6)
    settings = Settings(k_min=2, k_max=4, options=method.options(), train_tokens=100)
    method.objective(model, lambda: Forward(*model(tokens, tokens)), settings).total.backward()
    ran.append(name)
print(json.dumps({"from": sd.__file__, "parsed": parsed, "ran": ran}))
"""


def copy_of_the_tree(folder: Path) -> Path:
    """Everything that git tracks or would track, as it stands now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\0"):
        if name and Path(name).parts[0] not in LEFT_OUT and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def without(method: str, folder: Path) -> Path:
    """The tree without a method: its file, its line, and its scripts if it has any."""
    (folder / "smoe_dropout" / "methods" / f"{method}.py").unlink()
    for script in (folder / "script").rglob(f"{method}.sh"):
        script.unlink()
    registry = folder / "smoe_dropout" / "registry.py"
    lines = registry.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not re.match(rf'\s*"{method}": "smoe_dropout\.methods\.', line)]
    assert len(kept) == len(lines) - 1
    registry.write_text("".join(kept))
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python in the tree, with no path to the tested tree and no environment of pytest."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree without some methods. That none of them needs another one is checked by tests/pages/test_structure.py."""
    folder = copy_of_the_tree(tmp_path_factory.mktemp("tree"))
    for method in DELETED:
        without(method, folder)
    return folder


def test_everything_else_works_without_the_methods(tree):
    remaining = [name for name in METHODS if name not in DELETED]
    probe = python(tree, "-c", PROBE, *remaining)
    assert probe.returncode == 0, probe.stderr[-3000:]
    found = json.loads(probe.stdout)
    assert Path(found["from"]).is_relative_to(tree), "the copy was not what ran"
    assert found["ran"] == remaining
    assert {name: flags["method"] for name, flags in found["parsed"].items()} == dict(zip(remaining, remaining, strict=True))

    tests = python(tree, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", "structure or objective", *FILES)
    assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr[-2000:]


@pytest.mark.parametrize("method", DELETED)
def test_the_method_is_unknown_then(method, tree):
    gone = python(tree, "-m", "utils.cli.train", "--preset", "quick", "--method", method)
    assert gone.returncode == 2 and gone.stdout == ""
    assert gone.stderr.startswith(f"error: --method: unknown value {method!r}; ") and len(gone.stderr.splitlines()) == 1
