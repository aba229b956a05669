"""Fine-tuning in chunks, with two processes, and resumed after a kill gives the same results; folds."""

import random
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from smoe_dropout import set_top_k
from tests import tiny
from tests.harness.test_finetune import HOW, command, pretrained, pytestmark, rows, run_of  # noqa: F401 (fixtures)
from tests.harness.test_parallel import run_two
from tests.harness.test_report import row
from tests.harness.test_resume import die
from train import accumulate_gradients
from utils.models.heads import IGNORED
from utils.reporting.__main__ import main

E = tiny.TINY["moe_num_expert"]
PLAIN = {"dropout": 0.0, "log_interval": 1, "yes": True}


@pytest.fixture(scope="module")
def uneven(rows, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    """The rows; those of SVAMP have equations of 1, 3 and 5 symbols, and about half of the equations give the answer."""
    folder, draw = tmp_path_factory.mktemp("uneven"), random.Random(2)

    def problem() -> str:
        text, equation = " ".join(tiny.WORDS[: draw.randint(1, 4)]), draw.choice(("2", "2", "2", "+ 1 1", "- * 2 2 2"))
        return f"{text} number0,{draw.randrange(10)},{equation},{draw.choice('23')}\n"

    for name, count in (("train.csv", 30), ("dev.csv", 11)):
        (folder / name).write_text("Question,Numbers,Equation,Answer\n" + "".join(problem() for _ in range(count)))
    return rows | {"svamp": folder}


def first_gradients(arguments: list[str], k: int | None) -> dict[str, torch.Tensor]:
    """Gradients of the first step at k, by parameter."""
    run, network = run_of(arguments)
    task, network = run.task, run.engine.prepare(network).train()
    if k is not None:
        set_top_k(network, k)
    batch = task.training_batch(0)
    assert task.flags.task == "sst2" or len({int(n) for n in (batch.inputs[-1] != IGNORED).sum(1)}) > 1
    accumulate_gradients(run, network, run.objective(), batch, None)
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("model", ["transformer_xl", "bert"])
@pytest.mark.parametrize("task", ["sst2", "svamp"])
@pytest.mark.parametrize(("method", "k"), [("dense", None), ("smoe_dropout", E)])
def test_chunks_of_a_batch_give_its_gradients(method, k, task, model, uneven, pretrained):  # noqa: F811
    """Chunks of 8 rows and of 7, with equations of several lengths: every row counts the same."""
    arguments = command(task, uneven, pretrained(method, model), batch_size=15, **PLAIN)
    whole, parts = (first_gradients([*arguments, "--batch_chunk", chunks], k) for chunks in ("1", "2"))
    assert all(gradient.any() for name, gradient in whole.items() if "bias" not in name)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize(("method", "model", "lr"), [("dense", "transformer_xl", 3e-2), ("smoe_dropout", "bert", 1e-2)])
def test_two_processes_solve_the_problems_that_one_solves(method, model, lr, uneven, pretrained, tmp_path):  # noqa: F811
    """Batches of 5 rows, of which one process has 2; token and operation counts are equal too."""
    changes = {**PLAIN, "lr": lr, "max_step": 20, "eval_interval": 20}
    one, two = (command("svamp", uneven, pretrained(method, model), work_dir=tmp_path / name, **changes) for name in ("one", "two"))
    tiny.completed(one, program="finetune.py")
    both = run_two(two, program="finetune.py")
    assert [run.code for run in both] == [0, 0], both[0].err + both[1].err
    losses, same = ([line["loss"] for line in tiny.metrics(tmp_path / name, "train")] for name in ("one", "two"))
    assert same == pytest.approx(losses, rel=1e-4)
    ours, theirs = (tiny.read_json(tmp_path / name / "result.json") for name in ("one", "two"))
    assert tiny.quality(ours) == tiny.quality(theirs) and 0 < ours["quality"][-1]["test"] < 100
    for name in ("tokens", "flops"):
        assert ours["training"][name] == theirs["training"][name]


def test_bert_killed_and_resumed_is_unbroken(rows, pretrained, tmp_path):  # noqa: F811
    """Weights, optimiser and random state are the same bit for bit; dropout is on."""
    whole, broken = (command("sst2", rows, pretrained("smoe_dropout", "bert"), work_dir=tmp_path / name) for name in ("whole", "broken"))
    tiny.completed(whole, program="finetune.py")
    assert tiny.run(broken, partial(die, "step", 11, False), program="finetune.py").code == -signal.SIGKILL
    assert f"resumed at step {HOW['eval_interval']}" in tiny.completed(broken, program="finetune.py").out
    tiny.same_run(tmp_path / "broken", tmp_path / "whole")


def test_runs_of_two_folds_are_one_row(rows, pretrained, tmp_path, capsys):  # noqa: F811
    """Each is trained and scored on different rows."""
    for fold in (0, 4):
        changes = {"work_dir": tmp_path / str(fold), "fold": fold, "max_step": 4, "eval_interval": 4}
        tiny.completed(command("mawps", rows, pretrained("dense"), **changes), program="finetune.py")
    results = [tiny.read_json(tmp_path / str(fold) / "result.json") for fold in (0, 4)]
    assert [result["fold"] for result in results] == [0, 4] and len({result["dataset"]["fingerprint"] for result in results}) == 2
    main(["table2", "--runs", str(tmp_path)])
    text = capsys.readouterr().out
    assert "folds 0, 4 of 5" in text and row(text, "Dense")[0] == "Dense (n = 2)"
