"""Two processes compute the same as one, and resume as two.

Most runs here are two forked processes with the environment that torchrun would give them; torchrun and accelerate are started once.
"""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS, load
from tests import tiny

LANES = 5  # of which one process gets 2 and the other 3
SETTINGS = {"batch_size": LANES, "eval_batch_size": 3, "dropout": 0.0, "log_interval": 1, "max_step": 10, "eval_interval": 5, "yes": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text whose end is reached within the run, in a segment shorter than the others."""
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words", train_bytes=LANES * (8 * 8 + 4))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(rank: int, world_size: int, port: int) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, world_size, world_size, "127.0.0.1", port)
    os.environ.update(dict(zip(names, map(str, values), strict=True)))


def start_two(arguments: list[str], program: str = "train.py") -> list[tiny.Running]:
    port = free_port()
    return [tiny.Running(arguments, partial(as_rank, rank, 2, port), program) for rank in range(2)]


def run_two(arguments: list[str], timeout: float = 60.0, program: str = "train.py") -> list[tiny.Finished]:
    """Runs both to their end; a process whose partner failed is killed, as torchrun does."""
    runs = start_two(arguments, program)
    try:
        runs[0].wait_until(lambda: not runs[1].process.is_alive(), timeout)
        return [run.finish(timeout=10) for run in runs]
    finally:
        for run in runs:
            run.send(signal.SIGKILL)


def assert_same(one: Path, other: Path) -> None:
    """Losses and qualities are equal but for the rounding of float32, which is 6e-8 of each token's loss."""
    for ours, theirs in zip(tiny.metrics(one), tiny.metrics(other), strict=True):
        assert ours.keys() == theirs.keys() and (ours["step"], ours["split"], ours["k"]) == (theirs["step"], theirs["split"], theirs["k"])
        for name in ours.keys() - {"step", "split", "k", "lr"}:
            tolerance = 1e-4 if name in ("grad_norm", "auxiliary_loss") else 1e-6
            assert theirs[name] == pytest.approx(ours[name], rel=tolerance), (ours["step"], ours["split"], name)
    ours, theirs = (tiny.read_json(folder / "result.json") for folder in (one, other))
    for row, same in zip(ours["quality"], theirs["quality"], strict=True):
        assert same["k"] == row["k"] and same["test"] == pytest.approx(row["test"], rel=1e-6)
    for name in ("tokens", "flops", "steps"):
        assert ours["training"][name] == theirs["training"][name]


# they draw for every token, or in evaluation for every lane, so that other processes draw otherwise
DRAW = {"concrete_dropout", "dropblock", "thor"}
OF_EACH_PART = {
    "block_dropout",
    "competesmoe",
    "competesmoe2",
    "matryoshka",
}  # a draw, and losses that are of a part, and logged of the last
EXACT = [method for method in METHODS if method not in DRAW]


@pytest.mark.parametrize("method", sorted(DRAW & METHODS.keys()))
def test_methods_that_draw_run_on_two_processes(method, corpus, tmp_path):
    both = run_two(tiny.flags(corpus, tmp_path / "two", method=method, **SETTINGS))
    assert [run.code for run in both] == [0, 0], both[0].err + both[1].err
    assert tiny.read_json(tmp_path / "two" / "result.json")["environment"]["world_size"] == 2


PARTS = [method for method in EXACT if method not in OF_EACH_PART and load(METHODS, "method", method).flags.get("gate_name") != "learned"]


@pytest.mark.parametrize(("method", "parts"), [*((method, method in PARTS) for method in EXACT), ("smoe", True)])
def test_two_processes_give_the_losses_and_qualities_of_one(method, parts, corpus, tmp_path):
    """With parts, the 2 and 3 lanes of the two are split into equally many chunks: a router that counts over all processes would otherwise
    wait forever. The balance loss of a learned router is that of each part, so that only without it parts change nothing.
    """
    changes = {**SETTINGS, "method": method, **({"load_balance": 0.0} if parts and method not in PARTS else {})}
    tiny.completed(tiny.flags(corpus, tmp_path / "one", **changes))
    both = run_two(tiny.flags(corpus, tmp_path / "two", **changes, **({"batch_chunk": 3} if parts else {})), timeout=20)
    assert [run.code for run in both] == [0, 0], both[0].err + both[1].err
    assert both[1].out == "" and "2 process(es)" in both[0].out  # only the first speaks
    assert_same(tmp_path / "one", tmp_path / "two")
    assert tiny.read_json(tmp_path / "two" / "result.json")["environment"]["world_size"] == 2


def test_the_balance_loss_of_each_part_is_computed_by_two_processes(corpus, tmp_path):
    arguments = tiny.flags(corpus, tmp_path, **SETTINGS, method="smoe", batch_chunk=3)
    assert [run.code for run in run_two(arguments, timeout=20)] == [0, 0]


def test_two_processes_stop_together_and_resume_as_two_only(corpus, tmp_path):
    changes = {**SETTINGS, "method": "smoe_dropout", "dropout": 0.2, "max_step": 30, "eval_interval": 10, "save_interval": 5}
    unbroken, arguments = (tiny.flags(corpus, tmp_path / name, **changes) for name in ("unbroken", "run"))
    assert [run.code for run in run_two(unbroken)] == [0, 0]
    runs = start_two(arguments)
    runs[0].wait_until(lambda: "step 12/" in runs[0].out)
    runs[1].send(signal.SIGTERM)  # one signal, to one process
    assert [run.finish().code for run in runs] == [143, 143]
    alone = tiny.run(arguments)
    assert alone.code == 2 and "was made by 2 processes, and this run has 1: start the same number" in alone.err
    assert [run.code for run in run_two(arguments)] == [0, 0]
    tiny.same_run(tmp_path / "run", tmp_path / "unbroken")


def test_fewer_lanes_than_processes_are_refused(corpus, tmp_path):
    both = run_two(tiny.flags(corpus, tmp_path / "run", **{**SETTINGS, "batch_size": 1}))
    assert [run.code for run in both] == [2, 2] and "--batch_size 1 is less than the 2 processes" in both[0].err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_launchers_start_it(launcher, corpus, tmp_path):
    """The full command of the README; resuming a run of two processes with one is refused."""
    changes = {**SETTINGS, "method": "dense", "max_step": 4, "eval_interval": 4}
    port = (
        ["--nproc_per_node", "2", "--master_port"] if launcher == "torchrun" else ["--cpu", "--num_processes", "2", "--main_process_port"]
    )
    module = {"torchrun": ["torch.distributed.run"], "accelerate": ["accelerate.commands.launch", "--num_machines", "1"]}[launcher]
    command = [sys.executable, "-m", *module, *port, str(free_port()), "train.py", *tiny.flags(corpus, tmp_path / "two", **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT, env=environment, timeout=110)
    assert process.returncode == 0, process.stderr[-3000:]
    tiny.completed(tiny.flags(corpus, tmp_path / "one", **changes))
    assert_same(tmp_path / "one", tmp_path / "two")
