"""Tiny runs of train.py with BERT and RoBERTa: records, resuming after a kill, chunks, and two processes."""

import math
import signal
from functools import cache, partial
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS, load
from tests import tiny
from tests.harness.test_parallel import assert_same, run_two
from tests.harness.test_resume import die
from utils.reporting.__main__ import main
from utils.reporting.records import read_record

pytest.importorskip("transformers")

E, STEPS = 4, 14
# an epoch ends after 12 steps, the rows of a batch cannot be halved, log lines lie off validations
SETTINGS = {"batch_size": 5, "eval_batch_size": 4, "max_step": STEPS, "eval_interval": 8, "log_interval": 3}
OF_ROBERTA = ("smoe_dropout", "dense", "thor", "attention")  # the rest of it is BERT's
RUNS = [("bert", method) for method in METHODS] + [("roberta", method) for method in OF_ROBERTA if method in METHODS]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {model: tiny.write_pieces(root / model, model) for model in tiny.SPECIAL} | {"transformer_xl": tiny.write_corpus(root / "words")}


@pytest.fixture(scope="module")
def arguments(corpora):
    """The command line of a run of a model."""

    def of(text: str, folder: Path, **changes) -> list[str]:
        return tiny.flags(corpora[text], folder, **{**tiny.ENCODER, **SETTINGS, "model": text, **changes})

    return of


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """Returns the folder of an uninterrupted run, which is made once."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def of(model: str, method: str, **changes) -> Path:
        folder = root / "-".join([model, method, *map(str, changes.values())])
        assert tiny.completed(arguments(model, folder, method=method, **changes)).err == ""
        return folder

    return of


def refusal(run: tiny.Finished) -> str:
    """The one-line error of a refused run."""
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1, run
    return run.err


@pytest.mark.parametrize(("model", "method"), RUNS)
def test_every_method_completes_with_a_record(model, method, finished, corpora):
    folder, sparse = finished(model, method), load(METHODS, "method", method).sparse
    result = read_record(folder / "result.json")
    assert result["status"] == "complete" and result["metric"] == {
        "name": "loss",
        "lower_is_better": True,
        "split": "test",
        "training": "loss",
    }
    sizes = {"n_layer": 2, "d_model": 16, "n_head": 2, "d_ff": 32, "d_inner": 32 // E if sparse else 32, "tgt_len": 10}
    assert {name: result["model"][name] for name in ("architecture", *sizes)} == {"architecture": model, **sizes}
    assert "mem_len" not in result["model"] and result["model"]["moe_layers"] == ([0, 1] if sparse else [])
    assert result["dataset"]["pieces"] == {"train": 485, "valid": 59, "test": 59} and "bytes" not in result["dataset"]
    assert result["dataset"]["title"] == f"Pieces, {model}"
    assert [row["k"] for row in result["quality"]] == ([1, 2, 4] if sparse else [None])
    for row in result["quality"]:
        assert 0 < row["valid"] < 10 and 0 < row["test"] < 10 and row["test_tokens"] == 7 * 10
    for name in ("active_parameters", "flops_per_token"):
        values = [row[name] for row in result["quality"]]
        assert values == sorted(values) and values[0] > 0 and (not sparse or values[0] < values[-1])
    active, idle = (
        result["quality"][-1]["active_parameters"],
        getattr(load(METHODS, "method", method).layer, "variable", None) is True,
    )  # experts that do nothing
    assert active < result["parameters"]["total"] if idle else active == result["parameters"]["total"]
    training = result["training"]
    assert (training["steps"], training["tokens"]) == (STEPS, STEPS * 5 * 10)
    assert training["flops"] > 2 * STEPS * 5 * 10 * result["quality"][0]["flops_per_token"]
    assert (result["routing"] is not None) == sparse
    train, valid = tiny.metrics(folder, "train"), tiny.metrics(folder, "valid")
    assert [line["step"] for line in train] == [3, 6, 9, 12, 14] and [line["step"] for line in valid] == [8, 14]
    assert all(0 < line["loss"] < 10 and line["grad_norm"] > 0 for line in train) and "bpc" not in train[0]
    at_all = "loss_k4" if sparse else "loss"
    best = min(valid, key=lambda line: line[at_all])
    assert best["step"] == result["best_step"] and result["quality"][-1]["valid"] == pytest.approx(best[at_all], abs=1e-9)


@pytest.mark.parametrize(("model", "method"), [("bert", "smoe_dropout"), ("roberta", "dense"), ("bert", "thor")])
def test_killed_and_resumed_is_unbroken(model, method, arguments, finished, tmp_path):
    """Killed in the second epoch, after a checkpoint at step 8 of the first."""
    line = arguments(model, tmp_path, method=method)
    assert tiny.run(line, partial(die, "step", 13, False)).code == -signal.SIGKILL
    assert "resumed at step 8" in tiny.completed(line).out
    tiny.same_run(tmp_path, finished(model, method))


# parts and processes

ALIKE = [("bert", "smoe_dropout"), ("roberta", "dense")]
PLAIN = {"dropout": 0.0, "log_interval": 1, "yes": True}


@pytest.mark.parametrize(("model", "method"), ALIKE)
def test_parts_of_a_batch_give_the_same_losses(model, method, arguments, finished, tmp_path):
    tiny.completed(arguments(model, tmp_path, method=method, batch_chunk=2, **PLAIN))
    assert_same(finished(model, method, **PLAIN), tmp_path)


@pytest.mark.parametrize(("model", "method"), ALIKE)
def test_two_processes_give_the_losses_and_qualities_of_one(model, method, arguments, finished, tmp_path):
    both = run_two(arguments(model, tmp_path, method=method, **PLAIN))
    assert [run.code for run in both] == [0, 0] and both[1].out == "", both[0].err + both[1].err
    assert_same(finished(model, method, **PLAIN), tmp_path)


# afterwards


@pytest.mark.parametrize(("model", "method", "ks"), [("bert", "smoe_dropout", [1, 3]), ("roberta", "dense", [None])])
def test_eval_only_gives_the_numbers_of_the_result(model, method, ks, finished):
    folder = finished(model, method)
    tiny.completed(["--eval_only", "--work_dir", str(folder), *(["--k", "1,3"] if ks[0] else [])])
    evaluated, result = tiny.read_json(folder / "eval.json"), tiny.read_json(folder / "result.json")
    rows, known = ({row["k"]: row["test"] for row in found["quality"]} for found in (evaluated, result))
    assert list(rows) == ks and rows[ks[0]] == known[ks[0]] and all(map(math.isfinite, rows.values()))
    assert evaluated["best_step"] == result["best_step"] and evaluated["data"] == result["dataset"]["fingerprint"]


def test_the_report_has_a_table_and_the_figure_of_slimming(finished, tmp_path, capsys):
    runs = [str(finished("bert", method)) for method in ("smoe_dropout", "dense")]
    main(["table1", "--runs", *runs, "--figs", str(tmp_path / "Figs"), "--latex", str(tmp_path / "table.tex")])
    text = capsys.readouterr().out
    assert "Pieces, bert" in text and "| Test loss, k = E/2 = 2 | Test loss, k = E = 4 | Mean at k = 1 |" in text
    for run in runs:
        last = tiny.read_json(Path(run) / "result.json")["quality"][-1]["test"]
        assert f"{last:.3f}" in text
    assert "Test loss" in (tmp_path / "table.tex").read_text()
    figures = [path.name for path in (tmp_path / "Figs" / "table1").iterdir()]
    assert any(name.endswith("-slimmable.png") for name in figures) and any(name.endswith("-curves.png") for name in figures), figures


def test_the_mean_of_the_weights_is_tested_too(arguments, tmp_path):
    tiny.completed(arguments("bert", tmp_path, method="smoe_dropout", swad=True, swad_start=9, swad_end=14))
    result, valid = read_record(tmp_path / "result.json"), tiny.metrics(tmp_path, "valid")
    averaged = result["training"]["averaged"]
    assert (averaged["from"], averaged["to"], averaged["steps"]) == (9, 14, 6)
    rows = [(one["test"], other["test"]) for one, other in zip(averaged["quality"], result["quality"], strict=True)]
    assert all(0 < mean < 10 and mean != last for mean, last in rows)
    assert ["averaged_loss_k4" in line for line in valid] == [False, True]


@pytest.mark.parametrize("model", tiny.SPECIAL)
def test_the_loss_falls_where_there_is_something_to_learn(model, arguments, tmp_path):
    """A sequence repeats one piece, so context determines it; without context all 34 pieces are equally likely."""
    changes = {"max_step": 80, "eval_interval": 80, "lr": 2e-2, "clip": 1.0, "batch_size": 16, "dropout": 0.0, "yes": True}
    tiny.completed(arguments(model, tmp_path, method="dense", **changes, log_interval=8))
    losses = [line["loss"] for line in tiny.metrics(tmp_path, "train")]
    assert losses[0] > 3.2 and losses[-1] < math.log(34) - 1, losses


# refusals


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("transformer_xl", {"model": "bert"}, "holds bytes, and the model reads pieces: prepare one with `python data/prepare_pieces.py"),
        ("transformer_xl", {"model": "roberta"}, "holds bytes, and the model reads pieces"),
        ("roberta", {"batch_size": 61}, "has 485 pieces, 60 sequences of --tgt_len 10, and 61 are needed"),
        ("bert", {"mem_len": 600}, "--mem_len has no effect with --model bert: leave it out"),
        ("bert", {"preset": "replica"}, "--preset replica is none of --model bert: choose paper, laptop, quick"),
        ("bert", {"model": "bart"}, "--model: unknown value 'bart'; nearest: bert"),
    ],
)
def test_wrong_commands_are_refused(text, changes, said, arguments, tmp_path):
    assert said in refusal(tiny.run(arguments(text, tmp_path / "run", method="dense", **changes))) and not (tmp_path / "run").exists()


def test_word_pieces_are_refused_by_transformer_xl(corpora, tmp_path):
    said = refusal(tiny.run(tiny.flags(corpora["bert"], tmp_path / "run", method="dense")))
    assert "holds pieces, and the model reads bytes or tokens: prepare one with `python data/prepare.py NAME" in said


def test_another_mask_rate_is_another_run(arguments, finished):
    folder = finished("bert", "dense")
    said = refusal(tiny.run(arguments("bert", folder, method="dense", mask_rate=0.3)))
    assert "mask_rate was 0.15 and is now 0.3" in said
