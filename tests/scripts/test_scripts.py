"""Bash scripts: syntax, one row each, flags passed on, comments that agree with the resolved flags, and the runner of a table's rows."""

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
from tests.scripts import forked_python
from utils.cli.train import parse
from utils.flags.fields import Flags

ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # scripts find the Python of the tests
SCRIPTS = sorted((ROOT / "script").rglob("*.sh"))
TABLE1 = [path for path in SCRIPTS if path.parent.name == "table1" and path.name != "run_all.sh"]
FIGURE5 = [path for path in SCRIPTS if path.parent.name == "figure5"]
PAPER_ROWS = {"dense", "dense_dropout", "concrete_dropout", "dropblock", "smoe", "thor", "smoe_dropout"}

# phrases of the scripts' comments, and what they claim about the resolved flags
CLAIMS = {
    "the dense model": lambda flags: not flags.moe,
    "no dropout": lambda flags: flags.dropout == 0,
    "dense model with dropout": lambda flags: flags.dropout > 0,
    "learned router": lambda flags: flags.gate_name == "learned" and not flags.freeze_gate,
    "load-balance loss": lambda flags: flags.load_balance is None or flags.load_balance > 0,  # None: the router's own coefficient
    "frozen random router": lambda flags: flags.gate_name == "random" and flags.freeze_gate,
    "router of SMoE-Dropout": lambda flags: flags.gate_name == "random" and flags.freeze_gate,
    "constant k = E/2": lambda flags: not flags.dynamic_moe and flags.moe_top_k == flags.moe_num_expert // 2,
    "k growing from E/2 to E": lambda flags: (
        (flags.dynamic_moe, flags.dynamic_moe_mode, flags.moe_top_k_min, flags.moe_top_k_max)
        == (True, "linear_increase", flags.moe_num_expert // 2, flags.moe_num_expert)
    ),
    "k drawn anew at every step": lambda flags: (flags.dynamic_moe, flags.dynamic_moe_mode) == (True, "elastic"),
    "output times E": lambda flags: flags.output_scale == "dense",
    "all with experts": lambda flags: flags.moe and flags.moe_index is None,
    "with 8 layers": lambda flags: flags.n_layer == 8,
    "with 12 layers": lambda flags: flags.n_layer == 12,
}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def bash(*words, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, capture_output=True, text=True, env={**ENV, **environment})


def command_of(path: Path) -> list[str]:
    """The flags of train.py in a row's script."""
    return path.read_text().split("\npretrain ")[1].replace('"$@"', "").split()


def flags_of(path: Path, *more: str) -> Flags:
    return parse([*command_of(path), *more])[0]


def copy_of_the_repository(folder: Path) -> Path:
    """Programs and scripts, with what of them is compiled, without data, runs, records and figures."""
    left_out = {".git", ".venv", "runs", "data", "results", "Figs"}
    shutil.copytree(ROOT, folder, ignore=lambda where, names: left_out & set(names) if Path(where) == ROOT else set())
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results" / "published.json", folder / "results")
    forked_python.install(folder)
    return folder


def test_versions_agree():
    """pre-commit runs the ruff of the tests; the changelog and the citation name the version of the package."""
    ruff = re.search(r"ruff==(\S+)", (ROOT / "tests" / "requirements.txt").read_text())[1]
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text()
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text() and f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.name == "common.sh" or os.access(path, os.X_OK)


@pytest.mark.parametrize("script", ["table1/smoe_dropout", "table1/elastic_dense_scale", "figure5/8layers_smoe_dropout"])
def test_row_passes_flags_on(script, tmp_path):
    """From another folder: the resolved settings are printed, and a missing text is refused by name."""
    missing = tmp_path / "missing"
    done = bash(ROOT / "script" / f"{script}.sh", "--lr", "0.5", "--max_step", "7000", "--data", missing, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(missing) in done.stderr
    assert done.stdout == "settings: transformer_xl, preset paper: 7,000 steps, batch 22 x 512, adam, lr 0.5, cosine\n"


def test_row_refuses_a_wrong_flag_before_it_looks_for_data(tmp_path):
    done = bash(ROOT / "script/table1/smoe_dropout.sh", "--lr", "-1", "--preset", "laptop", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and done.stderr.startswith("error: --lr -1.0 must be above 0")


@pytest.mark.parametrize("path", TABLE1 + FIGURE5, ids=name)
def test_command_of_a_row(path):
    """Paper scale, a folder of the script's name, flags that every model of Table 1 accepts, and the user's flags last."""
    assert path.read_text().endswith(' "$@"\n')
    flags = flags_of(path)
    assert (flags.d_model, flags.tgt_len, flags.max_step, flags.preset) == (256, 512, 400_000, "paper")
    assert flags.d_ff == 8192 and flags.d_inner == (8192 // flags.moe_num_expert if flags.moe else 8192)
    run = {
        "directly_dense_training": "dense_dropout",
        "8layers_smoe_dropout": "smoe_dropout-8layers",
        "12layers_smoe_dropout": "smoe_dropout-12layers",
    }.get(path.stem, path.stem)
    assert flags.work_dir == f"runs/paper/enwik8/{run}-seed1111"
    for model, tokenizer in (("bert", "bert-base-uncased"), ("roberta", "roberta-base")):
        flags = flags_of(path, "--model", model)
        assert (flags.optim, flags.scheduler, flags.lr, flags.batch_size, flags.max_step) == ("adamw", "linear", 5e-5, 64, 100_000)
        assert (flags.d_model, flags.d_ff, flags.d_inner) == (768, 6144, 384 if flags.moe else 6144)
        assert flags.work_dir == f"runs/paper/{model}/bookcorpus-{tokenizer}/{run}-seed1111"


@pytest.mark.parametrize("model", ["transformer_xl", "bert", "roberta"])
def test_comments_agree_with_the_resolved_flags(model):
    claimed = set()
    for path in TABLE1 + FIGURE5:
        comment = " ".join(line for line in path.read_text().splitlines() if line.startswith("# "))
        flags = flags_of(path, "--model", model)
        for phrase, holds in CLAIMS.items():
            if phrase in comment:
                claimed.add(phrase)
                assert holds(flags), f"{path}: {phrase}"
    assert claimed == set(CLAIMS)


def test_no_script_states_settings_that_a_preset_decides():
    """Steps, optimiser and batch depend on preset and model; scripts print the resolved ones instead."""
    for path in TABLE1 + FIGURE5 + [path for path in SCRIPTS if path.parent.name in ("table2", "sst2") and path.name != "run_all.sh"]:
        comment = " ".join(line.lower() for line in path.read_text().splitlines() if line.startswith("# "))
        assert not any(word in comment for word in ("000 steps", "adam 1e", "adamw", "batch of", "learning rate", "published")), path


def test_rows_do_not_share_folders():
    """A row never takes another row's result for its own."""
    paths = [path for path in TABLE1 + FIGURE5 if path.stem != "directly_dense_training"]
    assert len({flags_of(path).work_dir for path in paths}) == len(paths)
    official = ROOT / "script/table1/directly_dense_training.sh"
    assert command_of(official) == command_of(official.with_name("dense_dropout.sh"))


def test_every_method_has_its_script():
    commands = {path.stem: flags_of(path).method for path in TABLE1}
    assert set(METHODS) == set(commands.values()) and all(commands[method] == method for method in METHODS)


def test_run_all_of_table1_resumes(tmp_path):
    """One row, two seeds: failures are reported and the other rows run; a second call runs what is missing and renders the table."""
    copy = copy_of_the_repository(tmp_path / "copy")
    sizes = tiny.flags(tiny.write_corpus(tmp_path / "words"), tmp_path / "unused", dataset="words", max_step=4, eval_interval=2)
    where = sizes.index("--work_dir")
    words = ["script/table1/run_all.sh", *sizes[:where], *sizes[where + 2 :]]

    def run(*more: str):
        return bash(*words, *more, cwd=copy, JOBS="2", SEEDS="1 2", ROWS="smoe")

    assert run("--seed", "3").returncode == 2 and not (copy / "runs").exists()
    broken = copy / "script" / "table1" / "smoe.sh"
    whole = broken.read_text()
    broken.write_text(whole.replace("\npretrain ", '\nif [[ "$*" == *"--seed 2"* ]]; then set -- "$@" --lr -1; fi\npretrain '))
    first = run()
    assert first.returncode == 1 and first.stdout.count("FAILED: error: --lr -1.0 must be above 0") == 1
    assert "2 rows: 0 finished, 2 to run, 2 at a time" in first.stdout and "rows left: 1, about 1 min)" in first.stdout
    assert "rerun the same command" in first.stderr
    broken.write_text(whole)
    results = {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("result.json")}
    assert len(results) == 1
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 rows: 1 finished, 1 to run" in second.stdout and "(rows left: 0)" in second.stdout
    assert len(list((copy / "runs").rglob("result.json"))) == 2 and list((copy / "runs").rglob("Figs/**/*.png"))
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert second.stdout.count("(n = 2)") == 1 and second.stdout.count("this run is complete") == 1


@pytest.mark.parametrize("model", ["transformer_xl", "bert"])
def test_run_all_of_table1_trains_every_row_of_the_model(model, tmp_path):
    """By default every script but the official duplicate; for encoders the paper's rows and elastic. The rows themselves only fail here."""
    copy = copy_of_the_repository(tmp_path / "copy")
    for path in TABLE1:
        (copy / path.relative_to(ROOT)).write_text("exit 1\n")
    write = tiny.write_corpus if model == "transformer_xl" else tiny.write_pieces
    done = bash("script/table1/run_all.sh", "--model", model, "--data", write(tmp_path / "text"), cwd=copy, SEEDS="1", JOBS="3")
    assert done.returncode != 0
    names = {line.split("-seed1: FAILED")[0] for line in done.stdout.splitlines() if "FAILED" in line}
    everything = {path.stem for path in TABLE1} - {"directly_dense_training"}
    assert names == (everything if model == "transformer_xl" else PAPER_ROWS | {"elastic"})


def test_run_all_of_table1_refuses_an_unknown_row(tmp_path):
    done = bash("script/table1/run_all.sh", "--data", tiny.write_corpus(tmp_path / "words"), "--preset", "quick", ROWS="dense no_such_row")
    assert done.returncode == 2 and "there is no script/table1/no_such_row.sh" in done.stderr


def test_quickstart_prints_a_table_figures_and_what_to_type_next(tmp_path):
    """At tiny size, without a network, with the installation made up; rerunning trains nothing."""
    copy = copy_of_the_repository(tmp_path / "copy")
    shutil.copytree(ROOT / "data", copy / "data", ignore=lambda _, names: [each for each in names if not each.endswith(".py")])
    checksum = "cat requirements.txt tests/requirements.txt | cksum"
    installed = subprocess.run(["bash", "-c", checksum], cwd=ROOT, capture_output=True, text=True)
    (copy / ".venv" / "installed").write_text(installed.stdout)
    sizes = {"n_layer": 1, "d_model": 16, "n_head": 1, "d_head": 8, "d_ff": 32, "moe_num_expert": 2, "tgt_len": 16, "mem_len": 16}
    sizes |= {"eval_tgt_len": 16, "max_step": 2, "eval_interval": 2, "max_eval_steps": 1, "max_test_steps": 1, "device": "cpu"}
    words = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    first = bash("script/quickstart.sh", *words, cwd=copy, **offline)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "preparing pystdlib instead" in first.stderr and "4 rows: 0 finished, 4 to run" in first.stdout
    table, _, rest = first.stdout.partition("\nfigures: ")
    assert table.count("(n = 1)") == 4
    figures = rest.splitlines()[0].split()
    assert figures and all((copy / figure).stat().st_size > 10_000 for figure in figures)
    again = bash("script/quickstart.sh", *words, cwd=copy, **offline)
    assert again.returncode == 0 and "4 rows: 4 finished, 0 to run" in again.stdout
    assert bash("script/quickstart.sh", "--method", "thor", cwd=copy).returncode == 2
    (evaluate,) = [line for line in rest.splitlines() if "--eval_only" in line]
    done = subprocess.run(evaluate.split("#")[0].replace("1,2,4", "1,2").split(), cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
