"""A killed or interrupted run resumes to the same numbers, bit for bit, as an uninterrupted one."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smoe_dropout.registry import METHODS
from tests import tiny

KILLS = 6
# dropout and memory on, segments left over at the end of the text, checkpoints between validations, log lines off both
LONG = {"max_step": 44, "eval_interval": 10, "save_interval": 4, "log_interval": 3, "dropout": 0.2, "mem_len": 12, "tgt_len": 8}
SHORT = {**LONG, "max_step": 26}  # still into the second epoch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words", train_bytes=4 * (15 * 8 + 4), held_out_bytes=36)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """Returns the folder of an uninterrupted run of a method, made once."""
    root = tmp_path_factory.mktemp("unbroken")

    @cache
    def of(method: str, **how) -> Path:
        folder = root / f"{method}-{(how or LONG)['max_step']}"
        tiny.completed(tiny.flags(corpus, folder, method=method, **(how or LONG)))
        return folder

    return of


def die(kind: str, number: int, after: bool) -> None:
    """Kills the process at the given "step" of the optimiser or "validation": before it, or after it, before anything is recorded."""
    from utils.training import evaluation

    left = number

    def watch(operation):
        def watched(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if after:
                    operation(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return watched

    if kind == "step":
        torch.optim.Adam.step = watch(torch.optim.Adam.step)
    else:
        evaluation.evaluate = watch(evaluation.evaluate)


def last_step(work_dir: Path) -> int:
    """The newest step in metrics.jsonl."""
    path = work_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return max((int(line.partition('"step": ')[2].partition(",")[0]) for line in lines), default=0)


def test_killed_many_times_a_run_ends_as_if_it_had_not_been(corpus, unbroken, tmp_path):
    """In a step or a validation; tests/faults has kills at every operation on a file."""
    draw, moments = random.Random(2303), []
    arguments = tiny.flags(corpus, tmp_path / "run", method="smoe_dropout", **LONG)
    for kill in range(KILLS):
        kind = ("step", "validation")[kill % 2]
        number = draw.randrange(*{"step": (1, 9), "validation": (1, 5)}[kind])
        if last_step(tmp_path / "run") >= LONG["max_step"] - 8:  # so near the end that a later one might not come
            kind, number = "step", draw.randrange(1, 4)
        moments.append((kind, number, last_step(tmp_path / "run")))
        assert tiny.run(arguments, partial(die, kind, number, draw.random() < 0.5)).code == -signal.SIGKILL, moments
    assert last_step(tmp_path / "run") >= LONG["max_step"] // 2 and moments[5][2] > 0, f"the kills did not come far: {moments}"
    tiny.completed(arguments)
    tiny.same_run(tmp_path / "run", unbroken("smoe_dropout"))
    assert len(tiny.read_json(tmp_path / "run" / "env.json")["starts"]) > KILLS / 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes(method, corpus, unbroken, tmp_path):
    """From the folder as a kill would have left it. Its last checkpoints are those of steps 20, 24 and 26."""
    folder = Path(shutil.copytree(unbroken(method, **SHORT), tmp_path / "run"))
    (folder / "result.json").unlink()
    for path in tiny.checkpoints(folder)[-2:]:
        shutil.rmtree(path)
    assert "resumed at step 20" in tiny.completed(tiny.flags(corpus, folder, method=method, **SHORT)).out
    tiny.same_run(folder, unbroken(method, **SHORT))
    assert len(tiny.read_json(folder / "env.json")["starts"]) == 2


def test_a_finished_run_is_left_alone(corpus, unbroken, tmp_path):
    folder = shutil.copytree(unbroken("dense", **SHORT), tmp_path / "run")
    again = tiny.completed(tiny.flags(corpus, folder, method="dense", **SHORT))
    assert again.out == f"this run is complete: {folder / 'result.json'}\n"
    tiny.same_run(folder, unbroken("dense", **SHORT))


@pytest.mark.parametrize("lr", [0.5, 1e-12], ids=["moving", "plateau"])
def test_plateau_and_adagrad_resume_too(lr, corpus, tmp_path):
    """At 1e-12 no weight moves, so validation never improves and the rate falls each time."""
    changes = {"method": "dense", "optim": "adagrad", "scheduler": "dev_perf", "lr": lr, **LONG}
    tiny.completed(tiny.flags(corpus, tmp_path / "unbroken", **changes))
    arguments = tiny.flags(corpus, tmp_path / "run", **changes)
    assert tiny.run(arguments, partial(die, "validation", 3, False)).code == -signal.SIGKILL
    tiny.completed(arguments)
    assert lr == 0.5 or len({line["lr"] for line in tiny.metrics(tmp_path / "run", "train")}) > 2
    tiny.same_run(tmp_path / "run", tmp_path / "unbroken")


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_step_and_says_how_to_go_on(number, code, corpus, unbroken, tmp_path):
    arguments = tiny.flags(corpus, tmp_path, method="smoe_dropout", **LONG)
    run = tiny.Running(arguments)
    run.wait_until(lambda: last_step(tmp_path) >= 21)
    run.send(number)
    finished = run.finish()
    assert finished.code == code and "Traceback" not in finished.err
    newest = tiny.read_json(tiny.checkpoints(tmp_path)[-1] / "state.json")["step"]
    assert newest >= 21 and tiny.checkpoints(tmp_path)[-1].name == f"step-{newest:08d}"
    said = finished.out.splitlines()[-1]
    assert said.startswith(f"stopped at step {newest}, saved in {tmp_path / 'checkpoints'}; to resume: ")
    command = shlex.split(said.partition("to resume: ")[2])
    assert command[0] == "python" and Path(command[1]).name == "train.py" and command[2:] == arguments
    assert not (tmp_path / "result.json").exists()
    tiny.completed(command[2:])
    tiny.same_run(tmp_path, unbroken("smoe_dropout"))


def stop_in_the_final_test() -> None:
    """SIGTERM arrives after training, when the final test begins."""
    import utils.training.evaluation

    whole = utils.training.evaluation.evaluate_all

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    utils.training.evaluation.evaluate_all = interrupted


def test_a_signal_during_the_final_test_is_not_swallowed(corpus, tmp_path):
    finished = tiny.run(tiny.flags(corpus, tmp_path, method="dense", max_step=2), stop_in_the_final_test)
    assert finished.code == 143, "SIGTERM was ignored"


def test_as_a_plain_process_sigterm_ends_with_143_and_tensorboard_keeps_every_step(corpus, tmp_path):
    """Not forked from a prepared process, so that the interpreter's shutdown is tested too."""
    arguments = tiny.flags(corpus, tmp_path / "run", method="dense", max_step=3000, log_interval=1, eval_interval=1000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tiny.ROOT) as process:
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(signal.SIGTERM)
                break
        out = process.stdout.read()
    assert process.returncode == 143 and "to resume: python train.py --n_layer 2" in out.splitlines()[-1]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [line["step"] for line in tiny.metrics(tmp_path / "run", "train")]
    assert "train/loss" in events.Tags()["scalars"], "the events of the run up to the signal were lost"
    assert [event.step for event in events.Scalars("train/loss")] == steps


def test_tensorboard_keeps_the_steps_before_a_kill(corpus, tmp_path):
    arguments = tiny.flags(corpus, tmp_path, method="dense", **{**LONG, "log_interval": 1})
    assert tiny.run(arguments, partial(die, "step", 26, False)).code == -signal.SIGKILL
    tiny.completed(arguments)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 45))
