"""Tiny runs of finetune.py from tiny runs of train.py: transferred weights, scores, resuming and refusals."""

import shutil
import signal
from functools import cache, partial
from pathlib import Path

import msgspec
import pytest
import torch

from smoe_dropout import save_model, top_k
from smoe_dropout.io import load_weights
from smoe_dropout.registry import METHODS
from tests import tiny
from tests.harness.test_parallel import run_two
from tests.harness.test_resume import die
from utils.cli.finetune import parse
from utils.data.equations import solves
from utils.data.rows import TASKS, read_examples
from utils.data.tokenizer import load_tokenizer, vocabulary_of
from utils.engine import Engine
from utils.models.build import build_model
from utils.models.registry import Shape
from utils.reporting.records import read_record
from utils.tasks.base import Batch
from utils.training.run import Run
from utils.training.setup import finetuning_run

SPLIT = {"svamp": "test"}
HOW = {
    "max_step": 16,
    "eval_interval": 8,
    "log_interval": 4,
    "batch_size": 5,
    "eval_batch_size": 4,
    "threads": 1,
    "device": "cpu",
    "lr": 3e-3,
    "warmup_step": 0,
    "yes": True,
}
METHODS_OF_TABLE = [method for method in ("dense", "smoe", "thor", "smoe_dropout") if method in METHODS]
pytestmark = pytest.mark.skipif(len(METHODS_OF_TABLE) < 4, reason="a method of the table is not here")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    return {task: tiny.write_rows(root / task, task) for task in TASKS}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Gives the folder of a finished pre-training run."""
    root = tmp_path_factory.mktemp("pretrained")
    words = tiny.write_corpus(root / "words")

    @cache
    def of(method: str, model: str = "transformer_xl") -> Path:
        folder, changes = root / f"{method}-{model}", {"max_step": 4, "eval_interval": 2, "method": method}
        if model == "transformer_xl":
            arguments = tiny.flags(words, folder, **changes)
        else:
            pieces = tiny.write_pieces(root / f"pieces-{model}", model)
            tokenizer = tiny.write_tokenizer(pieces / "tokenizer")
            tiny.change_meta(pieces, vocabulary=msgspec.structs.asdict(vocabulary_of(load_tokenizer(str(tokenizer)), str(tokenizer))))
            arguments = tiny.flags(pieces, folder, **{**tiny.ENCODER, **changes, "model": model})
        tiny.completed(arguments)
        return folder

    return of


def command(task: str, rows: dict[str, Path], checkpoint: Path, **changes: object) -> list[str]:
    values = {"task": task, "data": rows.get(task), "checkpoint": checkpoint, **HOW, **changes}
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def run_of(arguments: list[str]) -> tuple[Run, torch.nn.Module]:
    """The run of a command line, and its model before training."""
    flags, source = parse(arguments)
    run = finetuning_run(flags, read_examples(flags.task, Path(flags.data), flags.fold), Engine(flags), source)
    torch.manual_seed(flags.seed)
    return run, run.build().eval()


def made(arguments: list[str]):
    """The task of a command line, and its model before training."""
    run, model = run_of(arguments)
    return run.task, model


def refusal(arguments: list[str]) -> str:
    run = tiny.run(arguments, program="finetune.py")
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1, run
    return run.err


@pytest.mark.parametrize(
    ("task", "method", "model"),
    [
        *[("sst2", method, "transformer_xl") for method in METHODS_OF_TABLE],
        # every task, and either kind of task with either kind of model
        *[(task, "smoe_dropout", ("transformer_xl", "bert")[index % 2]) for index, task in enumerate(TASKS) if task != "sst2"],
        ("svamp", "thor", "bert"),
    ],
)
def test_a_run_scores_every_row_at_every_k(task, method, model, rows, pretrained, tmp_path):
    folder = tmp_path / "run"
    done = tiny.completed(command(task, rows, pretrained(method, model), work_dir=folder), program="finetune.py")
    assert done.err == ""
    result, split = read_record(folder / "result.json"), SPLIT.get(task, "dev")
    assert (result["table"], result["metric"]["split"], result["sparse"]) == ("table2", split, method != "dense")
    assert (result["method"], result["settings"], result["preset_settings"]["max_step"]) == (method, {}, HOW["max_step"])
    assert [row["k"] for row in result["quality"]] == ([1, 2, 4] if result["sparse"] else [None])
    eleventh = 100 / 11
    for row in result["quality"]:
        assert row[f"{split}_targets"] == 11 and row[split] == pytest.approx(eleventh * round(row[split] / eleventh))
    assert result["best_step"] == HOW["max_step"] and result.get("fold") == (0 if task in ("asdiv_a", "mawps") else None)
    losses = [line["loss"] for line in tiny.metrics(folder, "train")]
    assert len(losses) == 4 and min(losses[1:]) < losses[0]
    start = result["pretrained"]
    assert start["transferred"] and start["dataset"]["title"].startswith("Words" if model == "transformer_xl" else "Pieces")
    assert (start["preset"], start["steps"], start["method"], start["operations"]) == ("quick", 4, method, [])
    assert start["settings"] == ({"moe_num_expert": 4} if result["sparse"] else {})
    assert bool(start["new"]) == (model != "transformer_xl" or task in ("sst2", "csqa"))


def test_patterns_in_the_text_are_learned(rows, pretrained, tmp_path):
    """The label of a sentence is its last word, so a model that reads it scores 100 %."""
    folder = tmp_path / "run"
    arguments = command("sst2", rows, pretrained("smoe_dropout"), work_dir=folder, max_step=200, eval_interval=200, dropout=0.0)
    tiny.completed(arguments, program="finetune.py")
    assert tiny.read_json(folder / "result.json")["quality"][-1]["dev"] == 100


def batch_of(task, encoded: list) -> Batch:
    """A batch of encoded rows, padded to the longest."""
    inputs = task.collate(encoded, max(map(task.length, encoded)))
    return Batch(inputs, Shape(len(encoded), inputs[0].numel() // len(encoded), targets=1, sequences=task.sequences), rows=encoded)


PREDICTED = [(task, "smoe_dropout", model) for task in ("sst2", "csqa", "svamp") for model in ("transformer_xl", "bert")]
PREDICTED += [
    ("sst2", "dense", "bert"),
    ("svamp", "dense", "transformer_xl"),
    ("csqa", "smoe", "bert"),
    ("svamp", "smoe", "transformer_xl"),
]
PREDICTED += [("svamp", "smoe", "transformer_xl"), ("csqa", "thor", "transformer_xl"), ("svamp", "thor", "bert")]


@pytest.mark.parametrize(("task", "method", "model"), PREDICTED)
def test_predictions_do_not_depend_on_order_batch_or_padding(task, method, model, rows, pretrained):
    """Rows one by one, all together, and in another order. THOR draws experts by position in the batch unless it uses all."""
    made_task, network = made(command(task, rows, pretrained(method, model)))
    split = made_task.splits[0]
    encoded = made_task.read(made_task.corpus.held_out)
    assert len({made_task.length(row) for row in encoded}) > 4

    def outputs(chosen: list) -> list[torch.Tensor]:
        batch = batch_of(made_task, chosen)
        losses, _, logits = network(*batch.inputs, None)
        parts = logits.split([1] * len(chosen)) if len(logits) == len(chosen) else logits.split([len(row[1]) for row in chosen])
        return [torch.cat([loss, part.flatten()]) for loss, part in zip(losses, parts, strict=True)]

    assert split in ("dev", "test")
    for k in [None] if method == "dense" else [4] if method == "thor" else [1, 2, 4]:
        with torch.no_grad(), top_k(network, k) if k else torch.no_grad():
            together = outputs(encoded)
            for one, row in zip(together, encoded, strict=True):
                torch.testing.assert_close(outputs([row])[0], one, atol=1e-5, rtol=1e-5)
            shuffled = torch.randperm(len(encoded)).tolist()
            for index, other in zip(shuffled, outputs([encoded[index] for index in shuffled]), strict=True):
                torch.testing.assert_close(other, together[index], atol=1e-5, rtol=1e-5)
            if task == "svamp":
                written = made_task.write(network, batch_of(made_task, encoded))
                assert written == [made_task.write(network, batch_of(made_task, [row]))[0] for row in encoded]


@pytest.mark.parametrize("method", [method for method in ("dense", "smoe", "similarity") if method in METHODS])
def test_the_equation_that_is_written_is_the_likeliest_continuation(method, rows, pretrained, tmp_path):
    """Decoding without memory gives the same; after training, the score is the share of equations that solve their problem."""
    folder = tmp_path / "run"
    arguments = command("svamp", rows, pretrained(method), work_dir=folder, eval_interval=16)
    tiny.completed(arguments, program="finetune.py")
    task, network = made(arguments)
    load_weights(network, tiny.checkpoints(folder)[-1])
    batch = batch_of(task, task.read(task.corpus.held_out))
    written = task.write(network, batch)
    for (question, _, _), equation in list(zip(batch.rows, written, strict=True))[::3]:
        tokens = question.tolist()
        for _ in range(task._longest):
            with torch.no_grad():
                token = int(network.backbone.logits(torch.tensor([tokens]))[0][0, -1].argmax())
            if token == ord("\n"):
                break
            tokens.append(token)
        assert bytes(tokens[len(question) :]).decode(errors="replace") == equation
    right = sum(solves(equation, problem.numbers, problem.answer) for equation, (_, _, problem) in zip(written, batch.rows, strict=True))
    assert task.measure(network, batch, None) == (right, 11, None)
    assert tiny.read_json(folder / "result.json")["quality"][-1]["test"] == pytest.approx(100 * right / 11)


def test_the_weights_are_those_of_the_checkpoint(rows, pretrained):
    """All weights that the task uses, router included, and none with --from_scratch."""
    run = pretrained("smoe_dropout")
    tuning, network = run_of(command("sst2", rows, run))
    best = tiny.read_json(run / "result.json")["best_step"]
    backbone = load_weights(build_model(tuning.flags), run / "checkpoints" / f"step-{best:08d}")
    theirs, ours = dict(backbone.named_parameters()), dict(network.backbone.named_parameters())
    assert theirs.keys() - ours.keys() == {"head.bias"} and any("router" in name for name in ours)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert [name for name, tensor in ours.items() if not tensor.requires_grad] == [name for name in ours if "router" in name]
    _, scratch = made(command("sst2", rows, run, from_scratch=True, seed=5))
    random = [name for name, tensor in scratch.backbone.named_parameters() if tensor.dim() > 1]
    assert all(not torch.equal(dict(scratch.backbone.named_parameters())[name], theirs[name]) for name in random)
    record = tuning.provenance()["pretrained"]
    assert record["unused"] == ["head.bias"] and record["kept"] == sum(tensor.numel() for tensor in ours.values())


def test_killed_run_resumes_bit_for_bit(rows, pretrained, tmp_path):
    """The other kind of task, and of model: test_finetune_parts.py."""
    task = "svamp"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start = pretrained("smoe_dropout")
    tiny.completed(command(task, rows, start, work_dir=whole), program="finetune.py")
    arguments = command(task, rows, start, work_dir=broken)
    killed = tiny.run(arguments, partial(die, "step", 11, False), program="finetune.py")
    assert killed.code == -signal.SIGKILL
    tiny.completed(arguments, program="finetune.py")
    assert tiny.metrics(whole) == tiny.metrics(broken)
    last = (folder / "checkpoints" / f"step-{HOW['max_step']:08d}" / "model.safetensors" for folder in (whole, broken))
    assert len({path.read_bytes() for path in last}) == 1


def test_a_run_does_not_go_on_with_other_rows_or_another_checkpoint(rows, pretrained, tmp_path):
    folder = tmp_path / "run"
    tiny.completed(command("sst2", rows, pretrained("smoe_dropout"), work_dir=folder), program="finetune.py")
    other = {"sst2": tiny.write_rows(tmp_path / "other", "sst2", train=31)}
    assert "data_fingerprint was" in refusal(command("sst2", {"sst2": other["sst2"]}, pretrained("smoe_dropout"), work_dir=folder))
    copy = tmp_path / "copy"
    shutil.copytree(pretrained("smoe_dropout"), copy)
    step = tiny.checkpoints(copy)[-1]
    network = load_weights(build_model(parse(command("sst2", rows, copy))[0]), step)
    with torch.no_grad():
        network.content_bias.add_(1)
    shutil.rmtree(tmp_path / "weights", ignore_errors=True)
    save_model(network, tmp_path / "weights")
    text = refusal(command("sst2", rows, tmp_path / "weights", work_dir=folder, model="transformer_xl"))
    assert "checkpoint" in text


def test_eval_only_scores_again(rows, pretrained, tmp_path):
    folder = tmp_path / "run"
    tiny.completed(command("sst2", rows, pretrained("smoe_dropout"), work_dir=folder), program="finetune.py")
    tiny.completed(["--eval_only", "--work_dir", str(folder), "--k", "1,3,4"], program="finetune.py")
    again = {row["k"]: row["dev"] for row in tiny.read_json(folder / "eval.json")["quality"]}
    first = {row["k"]: row["dev"] for row in tiny.read_json(folder / "result.json")["quality"]}
    other = ["--eval_only", "--work_dir", str(folder), "--data", str(tiny.write_rows(tmp_path / "other", "sst2", train=29))]
    assert "does not hold the rows of the run" in refusal(other)
    assert "--task is the run's own with --eval_only" in refusal([*other, "--task", "svamp"])
    assert set(again) == {1, 3, 4} and all(again[k] == first[k] for k in (1, 4))
    assert "is a run of finetune.py" in tiny.run(["--eval_only", "--work_dir", str(folder)]).err
    run = tiny.run(["--eval_only", "--work_dir", str(pretrained("dense"))], program="finetune.py")
    assert run.code == 2 and "is a run of train.py" in run.err


def test_two_processes_score_like_one(rows, pretrained, tmp_path):
    """Without dropout, and with an odd number of rows."""
    start, how = pretrained("smoe_dropout"), {"dropout": 0.0, "yes": True}
    both = run_two(command("sst2", rows, start, work_dir=tmp_path / "two", **how), program="finetune.py")
    assert [run.code for run in both] == [0, 0], both[0].err + both[1].err
    tiny.completed(command("sst2", rows, start, work_dir=tmp_path / "one", **how), program="finetune.py")
    one, two = (tiny.metrics(tmp_path / name, "train") for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    ours, theirs = (tiny.read_json(tmp_path / name / "result.json")["quality"] for name in ("one", "two"))
    assert [(row["k"], row["dev"], row["dev_targets"]) for row in ours] == [(row["k"], row["dev"], row["dev_targets"]) for row in theirs]
