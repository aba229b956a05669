"""surgery.py on tiny trained models: results, measurements and refusals, and other programs reading its folder."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoe_dropout import calibrate, moe_layers
from smoe_dropout.io import load_weights, stored_tensors
from smoe_dropout.registry import SURGERIES, load
from smoe_dropout.surgery import keep_best
from surgery import row_passes, text_passes
from tests import tiny
from tests.conftest import ROOT
from tests.harness.test_resume import die
from utils.checkpoints.origin import open_source
from utils.cli.finetune import parse as parse_finetuning
from utils.cli.surgery import flags_after, parse
from utils.cli.train import parse as parse_training
from utils.data.corpus import Corpus
from utils.data.rows import read_examples
from utils.engine import Engine
from utils.flags.fields import AVERAGING, SCORES, SurgeryFlags, names
from utils.models.build import build_model
from utils.reporting.records import read_record
from utils.training.evaluation import evaluate_all
from utils.training.setup import finetuning_task, pretraining_run, pretraining_task

HOW = {"tokens": 480, "threads": 1, "device": "cpu"}
TRAINING = {"preset": "quick", "max_step": 4, "eval_interval": 2, "batch_size": 4, "eval_batch_size": 2, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "sst2", "sst2")


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """Returns the folder of a finished run of a method; sparse ones have two layers of four experts."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def of(method: str, model: str = "transformer_xl") -> Path:
        changes = {"max_step": 8, "eval_interval": 4, "method": method}
        data = words
        if model != "transformer_xl":
            changes, data = {**tiny.ENCODER, **changes, "model": model}, tiny.write_pieces(root / "pieces", model)
        tiny.completed(tiny.flags(data, root / f"{method}-{model}", **changes))
        return root / f"{method}-{model}"

    return of


@pytest.fixture(scope="module")
def operated(trained, tmp_path_factory):
    """Returns the folder of an operation that keeps two of four experts, and the program's output."""
    root = tmp_path_factory.mktemp("operated")

    @cache
    def of(method: str, model: str = "transformer_xl", run: str = "smoe") -> tuple[Path, str]:
        out = root / f"{method}-{model}-{run}"
        done = tiny.completed(command(trained(run, model), method=method, out=out), program="surgery.py")
        return out, done.out

    return of


def words_of(values: dict) -> list[str]:
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def command(run: Path, **changes) -> list[str]:
    return words_of({"from": run, "method": "drop", "keep": 2, **HOW, **changes})


def as_surgery(pretrained: dict) -> dict:
    """A record's entry of the weights that its run started from, in the form of surgery.json."""
    own = ("operations", "sha256", "transferred", "surgery", "teacher", "kept", "new", "unused")
    trained = {name: value for name, value in pretrained.items() if name not in own}
    return {"trained": trained, "operations": pretrained["operations"], **pretrained["surgery"]}


def content(folder: Path) -> dict:
    """The surgery.json of a folder without the hashes of its other files."""
    hashes = ("config_sha256", "calibration_sha256")
    return {name: value for name, value in tiny.read_json(folder / "surgery.json").items() if name not in hashes}


def refusal(arguments: list[str], program: str = "surgery.py") -> str:
    done = tiny.run(arguments, program=program)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done
    return done.err


@pytest.mark.parametrize(
    ("method", "model", "run"),
    [*((method, "transformer_xl", "smoe") for method in SURGERIES), ("drop", "transformer_xl", "smoe_dropout"), ("merge", "bert", "smoe")],
)
def test_surgery_folder_is_read_like_a_run_and_holds_the_measurements(method, model, run, operated, trained):
    """Its flags build a model that the weights fit, with every tensor outside the MoE layers unchanged."""
    out, printed = operated(method, model, run)
    surgery, source = tiny.read_json(out / "surgery.json"), open_source(out)
    before, after = surgery["before"], surgery["after"]
    assert before["experts"] == [4, 4] and sum(after["experts"]) == 4 and after["parameters"] < before["parameters"]
    assert [row["k"] for row in before["quality"]] == [1, 2, 4]
    assert [row["k"] for row in after["quality"]][-1] == max(after["experts"])
    flags = source.made
    with Engine(flags) as engine:
        reopened = pretraining_run(flags, Corpus.open(flags.data), engine)
        network = load_weights(reopened.build(), source.weights.parent)
        assert [layer.num_experts for _, layer in moe_layers(network)] == after["experts"]
        again = evaluate_all(reopened.task, engine.prepare(network), ("test",), [max(after["experts"])], lambda sentence: None)
    assert again[0]["test"] == pytest.approx(after["quality"][-1]["test"], rel=1e-6)
    theirs = load_file(open_source(trained(run, model)).weights)
    tensors = stored_tensors(network)
    inside = tuple(f"{name}." for name, _ in moe_layers(network))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items() if not name.startswith(inside))
    assert f"done: {out}" in printed and f"parameters: {before['parameters']:,} -> {after['parameters']:,}" in printed
    row = next(line for line in printed.splitlines() if line.split()[:2] == ["1", f"{before['quality'][0]['test']:.4f}"])
    assert row.split()[2:4] == ["->", f"{after['quality'][0]['test']:.4f}"]
    assert [one["k"] for one in surgery["time"]] == ([[4, k], [k, k]] if (k := max(after["experts"])) < 4 else [[4, 4]])


def test_quality_before_surgery_equals_the_record(operated, trained):
    out, _ = operated("drop")
    recorded = tiny.read_json(trained("smoe") / "result.json")["quality"]
    measured = tiny.read_json(out / "surgery.json")["before"]["quality"]
    assert [(row["k"], row["test"], row["flops_per_token"]) for row in measured] == [
        (row["k"], row["test"], row["flops_per_token"]) for row in recorded
    ]


def test_the_same_command_again_measures_nothing_and_another_one_is_refused(operated, trained):
    out, _ = operated("drop")
    stamp = (out / "surgery.json").stat().st_mtime_ns
    again = tiny.completed(command(trained("smoe"), out=out), program="surgery.py")
    assert again.out == f"this operation is complete: {out}\n"
    assert "holds another operation, of other keep" in refusal(command(trained("smoe"), out=out, keep=3))
    assert (out / "surgery.json").stat().st_mtime_ns == stamp


def test_cut_short_before_it_was_measured_it_ends_as_if_it_had_not_been(operated, trained, tmp_path):
    out = shutil.copytree(operated("drop")[0], tmp_path / "out")
    (out / "surgery.json").unlink()
    weights = out / "checkpoints" / "step-00000000" / "model.safetensors"
    before = weights.read_bytes()
    tiny.completed(command(trained("smoe"), out=out), program="surgery.py")
    assert weights.read_bytes() == before
    ours, theirs = (tiny.read_json(folder / "surgery.json")["after"] for folder in (out, operated("drop")[0]))
    assert tiny.quality(ours) == tiny.quality(theirs)


def die_before_a_file_is_there() -> None:
    """Kills the process before the first file that it wrote gets its name."""
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_killed_before_its_config_json_the_folder_is_still_its_own(operated, trained, tmp_path):
    arguments = command(trained("smoe"), out=tmp_path / "out")
    assert tiny.run(arguments, die_before_a_file_is_there, program="surgery.py").code == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", ".config.json.partial"}
    tiny.completed(arguments, program="surgery.py")
    ours, theirs = (tiny.quality(content(folder)["after"]) for folder in (tmp_path / "out", operated("drop")[0]))
    assert ours == theirs


@pytest.mark.parametrize(("model", "method"), [("transformer_xl", "merge"), ("bert", "drop")])
def test_further_training_records_the_surgery(model, method, operated, tmp_path):
    out, _ = operated(method, model)
    tiny.completed(words_of({"start_from": out, "work_dir": tmp_path / "run", **TRAINING}))
    record, surgery = read_record(tmp_path / "run" / "result.json"), content(out)
    assert record["table"] == "surgery" and as_surgery(record["pretrained"]) == surgery
    frozen = {"freeze_gate": True, "load_balance": 0.0} if method == "merge" else {}  # as MC-SMoE recovers
    assert (record["method"], record["settings"], record["preset"]) == ("smoe", frozen, "quick")
    assert record["parameters"]["total"] - record["parameters"]["trainable"] == (record["parameters"]["router"] if frozen else 0)
    (operation,) = surgery["operations"]
    assert (operation["method"], operation["from"], operation["keep"]) == (method, 4, 2) and surgery["trained"]["steps"] == 8
    assert "d_ff" not in record["preset_settings"] and record["model"]["num_experts"] == max(surgery["after"]["experts"])
    assert record["parameters"]["total"] == surgery["after"]["parameters"]
    again = open_source(tmp_path / "run")
    assert again.operations == (operation, {"method": "train", "steps": 4}) and again.trained == surgery["trained"]
    assert again.surgery == record["pretrained"]["surgery"]


def test_surgery_by_a_tasks_rows_is_fine_tuned_on_it(trained, rows, tmp_path):
    out = tmp_path / "out"
    arguments = command(trained("smoe_dropout"), method="uncurl", task="sst2", calibrate=rows, out=out)
    tiny.completed(arguments, program="surgery.py")
    surgery = content(out)
    (operation,) = surgery["operations"]
    assert operation["method"] == "uncurl" and operation["read"]["task"] == "sst2"
    how = {"task": "sst2", "data": rows, "checkpoint": out, "work_dir": tmp_path / "run", **TRAINING}
    tiny.completed(words_of(how), program="finetune.py")
    record = read_record(tmp_path / "run" / "result.json")
    assert record["table"] == "surgery" and as_surgery(record["pretrained"]) == surgery
    assert record["pretrained"]["operations"] == [operation] and [row["k"] for row in record["quality"]] == [1, 2]


def test_rows_that_are_held_out_later_decide_nothing(trained, tmp_path):
    """The rows of the held-out fold are not read, and no other fold can be held out afterwards."""
    rows = tiny.write_rows(tmp_path / "rows", "mawps")
    how = {"method": "uncurl", "task": "mawps", "fold": 1, "calibrate": rows, "out": tmp_path / "out"}
    arguments = command(trained("smoe"), **how)
    folds = [read_examples("mawps", rows, fold) for fold in (0, 1)]
    assert [parse(command(trained("smoe"), **how | {"fold": fold})).material for fold in (None, 1)] == folds and folds[0] != folds[1]
    tiny.completed(arguments, program="surgery.py")
    surgery = tiny.read_json(tmp_path / "out" / "surgery.json")
    assert surgery["operations"][0]["read"]["fold"] == 1
    tuned = {"task": "mawps", "data": rows, "checkpoint": tmp_path / "out", "work_dir": tmp_path / "run"}
    said = refusal(words_of({**tuned, "fold": 0}), "finetune.py")
    assert f"--fold 0: its rows were used to make {tmp_path / 'out'}" in said and "surgery.py --task mawps --fold 0" in said
    assert parse_finetuning(words_of({**tuned, "fold": 1}))[0].fold == 1


@pytest.mark.parametrize("task", ["sst2", "csqa", "svamp"])
@pytest.mark.parametrize("model", ["transformer_xl", "bert"])
def test_padding_of_rows_is_not_counted(task, model, trained, tmp_path):
    """Usage is the same for rows read one by one, without padding, and in batches."""
    run, data = trained("smoe", model), tiny.write_rows(tmp_path / task, task)
    if model == "bert":
        tiny.write_tokenizer(tmp_path / "tokenizer")
    from utils.cli import finetune as finetuning

    how = {"task": task, "checkpoint": run, "data": data, "eval_batch_size": 4, "dropout": 0.0, "device": "cpu"}
    found = []
    for size in (1, 6):
        flags, source = finetuning.parse(
            words_of({**how, "batch_size": size, "tokenizer": tmp_path / "tokenizer" if model == "bert" else None})
        )
        source = dataclasses.replace(source, flags={name: value for name, value in source.flags.items() if name != "vocabulary_sha256"})
        with Engine(flags) as engine:
            rows_of_task = finetuning_task(flags, read_examples(task, data), engine, source)
            model_ = build_model(flags, rows_of_task.vocabulary).eval()
            torch.manual_seed(0)
            for parameter in model_.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.3)
            rows_of_task.flags = dataclasses.replace(flags, eval_batch_size=size)
            every = list(rows_of_task.held_out("dev" if task != "svamp" else "test", everything=True))
            rows_of_task.next = iter(every).__next__
            count = sum(int(rows_of_task.sequences_of(batch)[1].sum()) for batch in every)
            calibration = calibrate(
                model_, row_passes(rows_of_task, model_, SurgeryFlags(source="", method="merge", tokens=count)), k=2, seed=0
            )
        found.append(calibration.usage)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "melt"}, "--method: unknown value 'melt'; known: merge"),
        ({"keep": 5}, "--keep 5 must be from 1 to the 4 experts of"),
        ({"keep": 0}, "--keep 0 must be from 1 to the 4 experts of"),
        ({"keep": None}, "--keep is missing: give the number of the 4 experts"),
        ({"k": 9}, "--k 9 must be from 1 to the 4 experts of"),
        ({"tokens": 0}, "--tokens 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"device": "tpu"}, "--device: unknown value 'tpu'"),
        ({"task": "sst"}, "--task: unknown value 'sst'; nearest: sst2"),
        ({"fold": 1}, "--fold 1: a text has no folds, leave it out"),
        ({"task": "sst2", "fold": 0}, "--fold 0: sst2 has no folds, leave it out"),
        ({"task": "mawps", "fold": 5}, "--fold 5: mawps has the folds 0 to 4"),
        ({"method": "uncurl", "by_layer": True}, "--by_layer has no effect with --method uncurl: leave it out"),
        ({"method": "merge", "pooled": True}, "--pooled has no effect with --method merge: leave it out"),
        ({"method": "reap", "at_least": 2}, "--at_least has no effect with the same number of experts in every layer: leave it out"),
        ({"method": "reap", "pooled": True, "at_least": 3}, "--at_least 3 must be at most --keep 2"),
        ({"rank": 4}, "--rank has no effect with --method drop: leave it out"),
        ({"method": "keep_best", "score": "usual"}, "--score: unknown value 'usual'; nearest: usage"),
        ({"method": "keep_best", "score": "router_norm", "task": "sst2"}, "--task has no effect with --score router_norm: leave it out"),
        ({"method": "compress", "rank": 4, "kept": 0.5}, "--keep has no effect with --method compress: leave it out"),
        ({"method": "compress", "keep": None, "kept": 0.5}, "--rank is missing: it must be from 1 to 16"),
        ({"method": "compress", "keep": None, "rank": 17, "kept": 0.5}, "--rank 17 must be from 1 to 16"),
        ({"method": "compress", "keep": None, "rank": 16, "kept": 0.0}, "--kept 0.0 must be above 0 and at most 1"),
        ({"from": "nowhere"}, "the checkpoint nowhere does not exist"),
        ({"calibrate": "nowhere"}, "nowhere is not a prepared text"),
        ({"data": "nowhere"}, "nowhere is not a prepared text"),
        ({"task": "sst2", "calibrate": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_surgery_commands_are_refused(changes, said, trained, tmp_path):
    assert said in refusal(command(trained("smoe"), **{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_the_norm_of_the_routers_rows_is_all_that_is_read_for_it(trained, tmp_path):
    """The two experts with the largest norm are kept in each layer, and no calibration is stored."""
    run, out = trained("smoe_dropout"), tmp_path / "out"
    tiny.completed(command(run, method="keep_best", score="router_norm", out=out), program="surgery.py")
    surgery = tiny.read_json(out / "surgery.json")
    assert "read" not in surgery["operations"][0] and not (out / "calibration.safetensors").exists()
    assert set(SCORES) == keep_best.SCORES.keys()
    assert set(AVERAGING) == {name for name in SURGERIES if "by_layer" in load(SURGERIES, "method", name).OPTIONS}
    theirs, ours = (load_file(open_source(folder).weights) for folder in (run, out))
    for name in (name for name in theirs if name.endswith("router.weight")):
        kept = theirs[name].norm(dim=1).topk(2).indices.sort().values
        assert torch.equal(ours[name], theirs[name][kept])


def test_refusals_do_not_wait_for_torch(trained):
    code = "import sys, utils.cli.surgery as s; s.parse(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *command(trained("smoe"))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unsuitable_checkpoints_are_refused(trained, rows, tmp_path):
    out = {"out": tmp_path / "out"}
    assert "without experts: it has no experts to remove" in refusal(command(trained("dense"), **out))
    pieces = tiny.write_pieces(tmp_path / "pieces")
    assert "holds pieces, and the model reads bytes" in refusal(command(trained("smoe"), calibrate=pieces, **out))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("kept")
    assert "holds something else" in refusal(command(trained("smoe"), out=tmp_path / "folder"))
    assert "holds something else" in refusal(command(trained("smoe"), out=trained("smoe_dropout")))
    tuned = tmp_path / "tuned"
    tiny.completed(
        words_of({"task": "sst2", "data": rows, "checkpoint": trained("smoe"), "work_dir": tuned, **TRAINING}), program="finetune.py"
    )
    assert "is a fine-tuned run of sst2" in refusal(command(tuned, **out))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.txt"] and not (tmp_path / "out").exists()


def test_refusals_of_the_library_leave_nothing_behind(words, trained, tmp_path):
    tiny.completed(tiny.flags(words, tmp_path / "hash", moe=True, gate_name="hash", max_step=2, eval_interval=2))
    assert "router 'hash' has no row per expert" in refusal(command(tmp_path / "hash", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_text_of_another_tokenizer_is_refused(trained, tmp_path):
    other = tiny.write_pieces(tmp_path / "other")
    tiny.change_meta(other, vocabulary=tiny.VOCABULARY | tiny.SPECIAL["bert"] | {"sha256": "1" * 64})
    assert "does not hold the word pieces that" in refusal(command(trained("smoe", "bert"), calibrate=other, out=tmp_path / "out"))


@pytest.mark.parametrize(("sizes", "by_layer"), [((2, 2), None), ((3, 1), "3,1")])
def test_flags_afterwards_say_experts_and_their_width(sizes, by_layer, trained):
    """k is the method's default for that number of experts."""
    plan = parse(command(trained("smoe_dropout")))
    made, flags = plan.made, flags_after(plan, sizes)
    assert (flags.moe_num_expert, flags.moe_experts_by_layer, flags.d_inner) == (max(sizes), by_layer, made.d_inner)
    assert flags.d_ff == max(sizes) * made.d_inner and flags.method == made.method
    assert (flags.moe_top_k_min, flags.moe_top_k_max) == (1, max(sizes))
    assert [layer.num_experts for _, layer in moe_layers(build_model(flags))] == list(sizes)


def test_compressed_experts_are_pruned_in_training_and_stored_pruned(trained, tmp_path):
    """U V + S equals the experts; a killed run prunes the same; the result is smaller and of equal quality."""
    run, out = trained("smoe"), tmp_path / "out"
    arguments = words_of({"from": run, "method": "compress", "rank": 4, "kept": 0.25, "out": out, "threads": 1, "device": "cpu"})
    tiny.completed(arguments, program="surgery.py")
    surgery = content(out)
    before, after = ([row["test"] for row in surgery[name]["quality"]] for name in ("before", "after"))
    assert after == pytest.approx(before, rel=1e-5) and surgery["operations"][0]["options"] == {"rank": 4, "kept": 0.25}
    how = {"start_from": out, "teacher": run, **TRAINING, "max_step": 12, "eval_interval": 4, "moe_prune_by": "units"}
    tiny.completed(words_of({**how, "work_dir": tmp_path / "whole"}))
    broken = words_of({**how, "work_dir": tmp_path / "broken"})
    assert tiny.run(broken, partial(die, "step", 7, False)).code == -signal.SIGKILL
    tiny.completed(broken)
    tiny.same_run(tmp_path / "whole", tmp_path / "broken")
    record, left = read_record(tmp_path / "whole" / "result.json"), tmp_path / "whole" / "compressed"
    rows = load_file(open_source(left).weights)["layers.0.feed_forward.core.experts.up_s"]
    assert rows.shape == (4, 1, 4, 32)  # of sixteen hidden units
    assert record["best_step"] == 12 and record["parameters"]["total"] < surgery["before"]["parameters"] < surgery["after"]["parameters"]
    tiny.completed(["--eval_only", "--k", "4", "--work_dir", str(left)])
    assert tiny.read_json(left / "eval.json")["quality"][0]["test"] == pytest.approx(record["quality"][-1]["test"], rel=1e-6)
    again = words_of({"from": left, "method": "compress", "rank": 4, "kept": 0.25, "out": tmp_path / "again"})
    assert "has compressed experts: operate on the model before compression" in refusal(again)
    done = tiny.run(words_of({"settings_from": tmp_path / "whole", "work_dir": tmp_path / "scratch"}))
    assert done.code == 2 and "has compressed experts: give the run before compression" in done.err
    frozen = {"freeze_gate": True, "load_balance": 0.0}
    training = {"method": "train", "steps": 12, "pruned_to": 0.25, "taught": True}
    *others, last = open_source(left).operations
    assert others == list(surgery["operations"]) and last == training | {"settings": frozen}
    pruned = record["pretrained"]["surgery"]
    changed = {"pruned_to": 0.25, "time": pruned["time"]}
    assert as_surgery(record["pretrained"]) == surgery | changed and pruned["time"] != surgery["time"]
    assert pruned["time"][0]["k"] == [4, 4] and pruned["time"][0]["ratio"] > 0 and open_source(left).surgery["time"] == pruned["time"]
    assert "needs --start_from a folder of surgery.py" in refusal(words_of({"moe": True, "moe_prune_to": 0.1}), "train.py")
    check_pruned_rows(out, tmp_path / "rows")


def check_pruned_rows(out: Path, run: Path) -> None:
    """They are stored as zeros, and not counted; experts keep different numbers of them."""
    tiny.completed(words_of({"start_from": out, "work_dir": run, **TRAINING, "max_step": 6, "eval_interval": 6}))
    record, left = read_record(run / "result.json"), run / "compressed"
    assert open_source(left).operations[-1]["pruned_by"] == "rows"
    tensors = load_file(open_source(left).weights)
    maps = [tensors[f"layers.{layer}.feed_forward.core.experts.{name}_s"] for layer in range(2) for name in ("up", "down")]
    kept, whole = sum(int(rows.count_nonzero()) for rows in maps), sum(rows.numel() for rows in maps)
    assert kept / whole == pytest.approx(0.25, abs=0.05) and all(rows.shape == (4, 1, 16, 32) for rows in maps)
    assert len({int(rows[expert].count_nonzero()) for rows in maps for expert in range(4)}) > 4
    with_pruned = build_model(open_source(left).made)
    assert record["parameters"]["total"] == sum(parameter.numel() for parameter in with_pruned.parameters()) - (whole - kept)
    tiny.completed(["--eval_only", "--k", "4", "--work_dir", str(left)])
    assert tiny.read_json(left / "eval.json")["quality"][0]["test"] == pytest.approx(record["quality"][-1]["test"], rel=1e-6)


def test_wide_layers_without_experts_are_kept_by_compressing_and_refused_by_the_others(words, tmp_path):
    """They are as wide as all experts of a layer together, and compression keeps the number of experts."""
    run, out = tmp_path / "run", tmp_path / "out"
    tiny.completed(tiny.flags(words, run, method="smoe", moe_index="0", dense_width="all", max_step=2, eval_interval=2))
    assert "their width would be lost" in refusal(command(run, out=out))
    assert "their width would be lost" in refusal(words_of({"settings_from": run, "moe_num_expert": 2}), "train.py")
    arguments = {"from": run, "method": "compress", "rank": 4, "kept": 0.25, "out": out, "threads": 1, "device": "cpu"}
    tiny.completed(words_of(arguments), program="surgery.py")
    surgery = tiny.read_json(out / "surgery.json")
    before, after = ([row["test"] for row in surgery[name]["quality"]] for name in ("before", "after"))
    assert after == pytest.approx(before, rel=1e-5)
    theirs, ours = (load_file(open_source(folder).weights) for folder in (run, out))
    dense = [name for name in theirs if "layers.1.feed_forward" in name]
    assert dense and all(torch.equal(ours[name], theirs[name]) for name in dense)


def test_as_many_examples_are_read_as_are_asked_for(trained):
    """A segment of the text is one; all of its positions count."""
    flags = open_source(trained("smoe")).made
    with Engine(flags) as engine:
        model, task = build_model(flags), pretraining_task(flags, Corpus.open(flags.data), engine)
        for given, tokens in (({"examples": 9}, 12 * 8), ({"examples": 4}, 4 * 8), ({"tokens": 33}, 64)):  # in batches of 4 segments of 8
            found = calibrate(model, text_passes(task, model, SurgeryFlags(source="", method="merge", **given)), k=2)
            assert found.tokens == tokens
    assert SurgeryFlags.examples == 256 and SurgeryFlags.tokens is None


def test_a_chain_of_operations_is_measured_against_the_first_model(trained, operated, tmp_path):
    """Merged, then compressed: the table compares the trained model with the final one."""
    merged, out = operated("merge")[0], tmp_path / "out"
    then = words_of({"from": merged, "method": "compress", "rank": 4, "kept": 0.25, "out": out, "threads": 1, "device": "cpu"})
    printed = tiny.completed(then, program="surgery.py").out
    first, chain = (tiny.read_json(folder / "surgery.json") for folder in (merged, out))
    same = ("trained", "source_sha256", "before")
    assert [chain[name] for name in same] == [first[name] for name in same]
    assert chain["operations"][:-1] == first["operations"] and chain["operations"][-1]["options"] == {"rank": 4, "kept": 0.25}
    assert chain["operations"][-1]["weights_sha256"] == open_source(merged).fingerprint
    assert chain["after"]["experts"] == first["after"]["experts"]
    (time,) = chain["time"]
    assert time["k"] == [4, max(chain["after"]["experts"])] and time["ratio"] > 0 and "before:" not in printed
    assert "this operation is complete" in tiny.completed(then, program="surgery.py").out
    other = tiny.write_corpus(tmp_path / "other", train_bytes=19_000)
    assert "was tested on another text than" in refusal(command(merged, keep=1, data=other, out=tmp_path / "third"))


def test_a_chain_is_tested_on_as_much_every_time(operated, tmp_path):
    said = refusal(command(operated("merge")[0], keep=1, max_test_steps=1, out=tmp_path / "out"))
    assert "--max_test_steps 1: " in said and "was tested with 80" in said


def test_surgery_on_a_distilled_run_does_not_need_its_teacher(trained, tmp_path):
    teacher = shutil.copytree(trained("smoe"), tmp_path / "teacher")
    tiny.completed(words_of({"start_from": trained("smoe"), "teacher": teacher, "work_dir": tmp_path / "run", **TRAINING}))
    shutil.rmtree(teacher)
    tiny.completed(command(tmp_path / "run", out=tmp_path / "out"), program="surgery.py")
    made = tiny.read_json(tmp_path / "out" / "config.json")
    assert (made["start_from"], made["teacher"]) == (None, None)


def test_settings_from_a_run_differ_in_the_experts_only(trained, tmp_path):
    """Sizes, text and training are the run's; k has the defaults for the new number of experts, its schedule the new length."""
    run = trained("smoe")
    how = {"settings_from": run, "moe_num_expert": 2, "work_dir": tmp_path, "max_step": 7}
    made, (flags, source) = open_source(run).made, parse_training(words_of(how))
    changed = {name for name, value in dataclasses.asdict(flags).items() if getattr(made, name) != value}
    derived = {*names(follows="moe_num_expert"), *names(follows="max_step")}
    assert source is None and changed == {"moe_num_expert", "max_step", "work_dir", "settings_from", *derived}
    assert (flags.moe_num_expert, flags.d_inner, flags.moe_top_k, flags.dynamic_overall_steps) == (2, made.d_inner, 1, 7)
    other = parse_training(words_of({"settings_from": run, "gate_name": "noisy_top_k", "dataset": "other", "work_dir": tmp_path}))[0]
    assert (other.load_balance, other.data) == (None, "data/other")
    again = parse_training(words_of({"settings_from": run, "seed": 2, "work_dir": tmp_path}))[0]
    assert dataclasses.replace(again, seed=made.seed, work_dir=None, settings_from=None) == made


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"moe_num_expert": "two"}, "two"),
        ({"moe_num_expert": 0}, "--moe_num_expert 0 must be at least 1"),
        ({"preset": "laptop"}, "--preset laptop, but the checkpoint"),
        ({"method": "dense"}, "--method dense, but the checkpoint"),
        ({"start_from": "RUN"}, "leave one out"),
        ({"settings_from": "nowhere"}, "the checkpoint nowhere does not exist"),
    ],
)
def test_contradictions_of_settings_from_are_refused(changes, refused, trained, tmp_path):
    run = trained("smoe")
    values = {"settings_from": run, "work_dir": tmp_path / "run", **{n: run if v == "RUN" else v for n, v in changes.items()}}
    done = tiny.run(words_of(values))
    assert done.code == 2 and refused in done.err and not (tmp_path / "run").exists()
