"""train.py --start_from: pre-training continued from the weights of a finished run, which sets the model's flags."""

import json
import shutil
import signal
from functools import partial

import pytest
import torch

from smoe_dropout import set_top_k
from smoe_dropout.io import load_weights, stored_tensors
from smoe_dropout.methods.base import Forward
from tests import tiny
from tests.harness.test_resume import die
from utils.checkpoints.origin import open_source
from utils.cli.train import parse
from utils.data.corpus import Corpus
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.derive import top_k_schedule
from utils.models.build import build_model
from utils.reporting.labels import operations_label
from utils.reporting.records import read_record
from utils.training.identity import provenance
from utils.training.setup import pretraining_run

HOW = {
    **{"preset": "quick", "max_step": 12, "eval_interval": 4, "log_interval": 2, "batch_size": 4, "eval_batch_size": 2},
    **{"device": "cpu", "threads": 1, "lr": 3e-3},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """A finished run with k from 2 to 4."""
    folder = tmp_path_factory.mktemp("runs") / "first-seed1"
    tiny.completed(tiny.flags(words, folder, method="smoe_dropout", max_step=8, eval_interval=4))
    return folder


def command(start, **changes) -> list[str]:
    words = []
    for name, value in {"start_from": start, **HOW, **changes}.items():
        words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def refusal(arguments: list[str], **more) -> str:
    done = tiny.run(arguments, **more)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done
    return done.err


def test_checkpoint_decides_the_model_and_the_command_line_the_training(run):
    flags, source = parse(command(run))
    made = tiny.read_json(run / "config.json")
    for name in ("d_model", "d_inner", "tgt_len", "n_layer", "moe_num_expert", "method", "gate_name", "data", "dropout"):
        assert getattr(flags, name) == made[name]
    assert (flags.max_step, flags.batch_size, flags.scheduler) == (12, 4, "cosine")
    assert [top_k_schedule(flags)(step) for step in (0, 11)] == [2, 4] and flags.dynamic_overall_steps == 12
    with Engine(flags) as engine:
        model = pretraining_run(flags, Corpus.open(flags.data), engine, source).build()
    best = run / "checkpoints" / f"step-{tiny.read_json(run / 'result.json')['best_step']:08d}"
    theirs = stored_tensors(load_weights(build_model(flags), best))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in stored_tensors(model).items())


def test_default_folder_and_origin_in_the_record(run, tmp_path):
    assert parse(command(run))[0].work_dir == "runs/quick/words/from/first-seed1/smoe_dropout-seed1111"
    assert parse(command(run, data="texts/other"))[0].dataset == "other"
    done = tiny.completed(command(run, work_dir=tmp_path / "run"))
    assert f"weights from {run} (Words, 8 steps)" in done.out and done.out.count("weights from") == 1
    record, before = read_record(tmp_path / "run" / "result.json"), read_record(run / "result.json")
    assert (record["table"], before["table"]) == ("surgery", "table1")
    assert record["method"] == before["method"] == "smoe_dropout" and "pretrained" not in before
    assert record["settings"] == before["settings"] == {"moe_num_expert": 4}
    start = record["pretrained"]
    assert start["transferred"] and start["operations"] == [] and start["settings"] == {"moe_num_expert": 4}
    assert (start["dataset"]["title"], start["preset"], start["steps"]) == ("Words", "quick", 8)
    assert start["sha256"] == open_source(run).fingerprint and "surgery" not in start
    assert record["curve"]["train"][0][1] < before["curve"]["train"][0][1]  # it goes on where that one ended
    again = open_source(tmp_path / "run")
    assert again.trained == {name: start[name] for name in again.trained} and again.operations == ({"method": "train", "steps": 12},)


def test_settings_of_an_intermediate_training_are_recorded(run, tmp_path):
    """Runs that differ in it are not averaged: their labels and records differ."""
    labels = set()
    for k in (1, 2):
        tiny.completed(command(run, work_dir=tmp_path / f"k{k}", moe_top_k=k, dynamic_moe=None, method=None, seed=k, moe_top_k_min=k))
        operations = provenance(open_source(tmp_path / f"k{k}"), transferred=True)["operations"]
        assert [one["method"] for one in operations] == ["train"]
        labels.add(operations_label(operations))
    assert len(labels) == 2, labels


def test_killed_run_from_weights_resumes_bit_for_bit(run, tmp_path):
    tiny.completed(command(run, work_dir=tmp_path / "whole"))
    arguments = command(run, work_dir=tmp_path / "broken")
    assert tiny.run(arguments, partial(die, "step", 7, False)).code == -signal.SIGKILL
    tiny.completed(arguments)
    tiny.same_run(tmp_path / "whole", tmp_path / "broken")


def test_it_goes_on_without_the_weights_in_evaluation_and_with_the_same_ones_in_training(run, tmp_path):
    start = shutil.copytree(run, tmp_path / "start")
    arguments = command(start, work_dir=tmp_path / "run")
    tiny.completed(arguments)
    with open(open_source(start).weights, "ab") as file:
        file.write(b"\0")
    assert "is damaged" in refusal(arguments)
    shutil.rmtree(start)
    tiny.completed(["--eval_only", "--k", "1,4", "--work_dir", str(tmp_path / "run")])
    rows = {row["k"]: row["test"] for row in tiny.read_json(tmp_path / "run" / "result.json")["quality"]}
    assert [row["test"] for row in tiny.read_json(tmp_path / "run" / "eval.json")["quality"]] == [rows[1], rows[4]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_from": "nowhere"}, "the checkpoint nowhere does not exist"),
        ({"moe_num_expert": 8}, "--moe_num_expert 8, but the checkpoint"),
        ({"method": "dense"}, "has method = smoe_dropout: leave it out"),
        ({"d_model": 16}, "has d_model = 32: leave it out"),
        ({"lr": -1}, "--lr -1.0 must be above 0"),
        ({"preset": "nothing"}, "--preset: unknown value 'nothing'"),
        ({"data": "nowhere"}, "nowhere is not a prepared text"),
    ],
)
def test_flags_contradicting_the_checkpoint_are_refused(changes, said, run, tmp_path):
    assert said in refusal(command(**{"start": run, "work_dir": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()


def test_a_text_of_other_pieces_is_refused(tmp_path):
    """The vocabularies have the same size, so that all weights would fit."""
    sizes = {**tiny.ENCODER, "model": "bert", "method": "smoe_dropout", "max_step": 2, "eval_interval": 2}
    tiny.completed(tiny.flags(tiny.write_pieces(tmp_path / "pieces"), tmp_path / "first", **sizes))
    other = tiny.write_pieces(tmp_path / "other")
    tiny.change_meta(other, vocabulary=tiny.VOCABULARY | tiny.SPECIAL["bert"] | {"sha256": "1" * 64})
    changes = {"work_dir": tmp_path / "run", "max_step": 2, "eval_interval": 2}
    assert "was trained on other word pieces" in refusal(command(tmp_path / "first", data=other, **changes))
    tiny.completed(command(tmp_path / "first", **changes))


def test_finetuning_has_another_flag_for_it(run, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows", "sst2")
    arguments = ["--task", "sst2", "--data", str(rows), "--checkpoint", str(run), "--start_from", str(run)]
    assert "fine-tuning starts from --checkpoint" in refusal(arguments, program="finetune.py")


def test_a_run_made_before_these_flags_is_read_as_one_without_them(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    config = tiny.read_json(old / "config.json")
    later = {"start_from", "moe_experts_by_layer"}
    assert later < config.keys()
    (old / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in later}))
    assert open_source(old).flags["moe_experts_by_layer"] is None
    assert "this run is complete" in tiny.completed(tiny.flags(config["data"], old, method="smoe_dropout", max_step=8, eval_interval=4)).out
    (old / "result.json").unlink()
    with pytest.raises(UserError, match="has not ended"):
        open_source(old)


def test_a_teacher_is_followed_and_the_record_says_so(run, tmp_path):
    """A model taught by itself differs only by k; the run resumes exactly, with the memory of both."""
    with Engine(parse(command(run))[0]) as engine:
        flags, source = parse(command(run, teacher=run, dropout=0.0))
        learning = pretraining_run(flags, Corpus.open(flags.data), engine, source)
        model, batch, objective = learning.build().train(), learning.task.next(), learning.objective()

        def forward() -> Forward:
            return learning.forward(lambda inputs, state: Forward(*model(*inputs, state)), batch.inputs, None)

        state = forward().state
        assert len(state) == 2 * (flags.n_layer + 1)
        assert not torch.equal(state[2], state[5])  # after layers at k = 2 and at k = E
        set_top_k(model, 4)
        part = objective(model, forward)
        torch.testing.assert_close(part.total, part.nll)  # at k = E the model and the teacher predict the same
        with torch.no_grad():
            model.embedding.weight.mul_(-4.0)
        part = objective(model, forward)
        assert part.total > part.nll + 1e-3
    arguments = {"teacher": run, "teacher_weight": 0.5}
    tiny.completed(command(run, work_dir=tmp_path / "whole", **arguments))
    broken = command(run, work_dir=tmp_path / "broken", **arguments)
    assert tiny.run(broken, partial(die, "step", 7, False)).code == -signal.SIGKILL
    tiny.completed(broken)
    tiny.same_run(tmp_path / "whole", tmp_path / "broken")
    record = read_record(tmp_path / "whole" / "result.json")
    assert record["settings"] == {"moe_num_expert": 4, "teacher_weight": 0.5, "teacher_temperature": 2.0, "teacher_squared": False}
    assert record["pretrained"]["teacher"]["sha256"] == record["pretrained"]["sha256"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "nowhere"}, "the checkpoint nowhere does not exist"),
        ({"teacher_weight": 0.3}, "--teacher_weight needs --teacher"),
        ({"teacher_temperature": 0.0}, "--teacher_temperature 0.0 must be above 0"),
        ({"start_from": None, "teacher": "nowhere"}, "--teacher needs --start_from"),
    ],
)
def test_unsuitable_teachers_are_refused(changes, said, run, tmp_path):
    assert said in refusal(command(**{"start": run, "work_dir": tmp_path / "run", **changes}))


def test_a_teacher_of_other_sizes_is_refused(run, words, tmp_path):
    tiny.completed(tiny.flags(words, tmp_path / "small", method="dense", max_step=2, eval_interval=2, n_layer=1))
    assert "has n_layer = 1, not 2: choose one of the same shape" in refusal(command(run, teacher=tmp_path / "small"))
