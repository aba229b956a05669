"""Damaged checkpoints, folders of other runs, full disks, and values that are not finite."""

import contextlib
import fcntl
import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from utils.checkpoints import storage
from utils.errors import UserError

SHORT = {"method": "smoe_dropout", "max_step": 16, "eval_interval": 8, "save_interval": 4, "dropout": 0.2}
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "rank0.json", "rank0.safetensors", "smoe_config.json", "state.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of a run of 16 steps, with checkpoints of steps 12 and 16 (and 8, were it the best)."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny.completed(tiny.flags(corpus, folder, **SHORT))
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of that folder as a kill during the final test leaves it."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refused(arguments: list[str], code: int = 2, before=None) -> str:
    """The message of a run that ends with an error, on one line and without a traceback."""
    run = tiny.run(arguments, before)
    assert run.code == code and "Traceback" not in run.err and run.err.startswith("error: ") and run.err.count("\n") == 1, run
    return run.err


# damaged checkpoints


def second_validation_is_the_best() -> None:
    from utils.training import evaluation

    qualities = iter([5.0, 4.0, *range(5, 99)])
    evaluate = evaluation.evaluate
    evaluation.evaluate = lambda *arguments: {**evaluate(*arguments), "bpc": float(next(qualities))}


def test_the_last_two_the_best_and_the_last_validation_are_kept_and_nothing_else(corpus, finished, tmp_path):
    """The validation before the last is kept because its routing is compared with the final one."""
    assert [path.name for path in tiny.checkpoints(finished)] == ["step-00000008", "step-00000012", "step-00000016"]
    for path in tiny.checkpoints(finished):
        assert sorted(file.name for file in path.iterdir()) == list(FILES)
        storage.verify(path)
    assert not list((finished / "checkpoints").glob(".*"))
    modes = {path.stat().st_mode for path in finished.rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors by itself lets only the owner read
    changes = {**SHORT, "max_step": 24, "eval_interval": 4, "method": "dense", "save_interval": 0}
    tiny.completed(tiny.flags(corpus, tmp_path, **changes), second_validation_is_the_best)
    assert [path.name for path in tiny.checkpoints(tmp_path)] == ["step-00000008", "step-00000020", "step-00000024"]
    assert tiny.read_json(tmp_path / "result.json")["best_step"] == 8


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_the_newest_checkpoint_is_named_and_the_one_before_is_used(name, corpus, finished, stopped):
    newest = tiny.checkpoints(stopped)[-1]
    flip(newest / name)
    run = tiny.completed(tiny.flags(corpus, stopped, **SHORT))
    warning = next(line for line in run.out.splitlines() if line.startswith("WARNING: "))
    assert str(newest) in warning and (name in warning or name == "manifest.json") and "falling back" in warning
    assert "resumed at step 12" in run.out
    tiny.same_run(stopped, finished)


def test_a_missing_file_is_named(stopped):
    folder = tiny.checkpoints(stopped)[-1]
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(UserError, match=re.escape(f"{folder / name} is missing")):
            storage.verify(folder)
        (folder / name).write_bytes(content)
    storage.verify(folder)


@pytest.mark.parametrize("name", ["manifest.json", "optimizer.safetensors"])
def test_a_checkpoint_with_a_missing_file_is_not_used(name, corpus, finished, stopped):
    (tiny.checkpoints(stopped)[-1] / name).unlink()
    run = tiny.completed(tiny.flags(corpus, stopped, **SHORT))
    assert "resumed at step 12" in run.out and (name == "manifest.json" or name in run.out)
    tiny.same_run(stopped, finished)


def test_every_flipped_bit_of_a_manifest_is_found(stopped):
    folder = tiny.checkpoints(stopped)[-1]
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, 8 * len(whole), 3):
        byte, bit = divmod(position, 8)
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
        same = False
        with contextlib.suppress(ValueError):  # white space may change into other white space
            same = json.loads(path.read_bytes()) == json.loads(whole)
        try:
            storage.verify(folder)
            assert same, f"the flip at {position} was not seen"
        except UserError:
            pass
    for content in ("[]", "{}", "3", '{"model.safetensors": 1}', ""):
        path.write_text(content)
        with pytest.raises(UserError):
            storage.verify(folder)


def test_when_all_are_damaged_the_run_is_refused(corpus, stopped):
    for path in tiny.checkpoints(stopped):
        flip(path / "model.safetensors")
    run = tiny.run(tiny.flags(corpus, stopped, **SHORT))
    assert run.code == 2 and run.out.count("WARNING: ") == 3
    assert "no checkpoint in" in run.err and "is undamaged" in run.err and "another --work_dir" in run.err


def test_leftovers_of_kills_are_removed(corpus, finished, stopped):
    root = stopped / "checkpoints"
    shutil.rmtree(root / "step-00000016")
    (root / ".step-00000015.partial").mkdir()
    (root / ".step-00000015.partial" / "model.safetensors").write_bytes(b"half")
    (root / ".step-00000004.removed").mkdir()
    (root / ".step-00000004.removed" / "optimizer.safetensors").write_bytes(b"old")
    (stopped / ".result.json.partial").write_bytes(b"half")
    (stopped / "metrics.partial").write_bytes(b"of version 0.1")
    tiny.completed(tiny.flags(corpus, stopped, **SHORT))
    tiny.same_run(stopped, finished)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000008", "step-00000012", "step-00000016"]
    assert not list(stopped.glob("*.partial"))


# folders


def test_another_configuration_is_refused_with_the_difference(corpus, stopped):
    said = refused(tiny.flags(corpus, stopped, **{**SHORT, "lr": 0.5, "seed": 7}))
    assert "lr was 0.003 and is now 0.5" in said and "seed was 1111 and is now 7" in said and "max_step" not in said
    other = tiny.write_corpus(stopped.parent / "other", train_bytes=9999)
    assert "data_fingerprint was" in refused(tiny.flags(other, stopped, **SHORT))
    assert len(tiny.metrics(stopped)) == 4 + 2


def test_a_folder_in_use_is_refused_until_it_is_free(corpus, finished, stopped):
    with open(stopped / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "in use by another run" in refused(tiny.flags(corpus, stopped, **SHORT))
    tiny.completed(tiny.flags(corpus, stopped, **SHORT))
    tiny.same_run(stopped, finished)


def test_of_two_runs_started_in_one_folder_the_second_is_refused(corpus, tmp_path):
    arguments = tiny.flags(corpus, tmp_path / "run", method="dense", max_step=40, log_interval=1)
    first = tiny.Running(arguments)
    first.wait_until(lambda: "step" in first.out)
    first.send(signal.SIGSTOP)  # which keeps its lock
    try:
        assert "in use by another run" in refused(arguments)
    finally:
        first.send(signal.SIGCONT)
    assert first.finish().code == 0


def test_foreign_folders_are_refused_and_left_alone(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "holds other files and no run" in refused(tiny.flags(corpus, tmp_path / "mine", **SHORT))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert "is a file" in refused(tiny.flags(corpus, tmp_path / "mine" / "thesis.tex", **SHORT))
    (tmp_path / "empty").mkdir()
    tiny.completed(tiny.flags(corpus, tmp_path / "empty", method="dense", max_step=1))


def test_a_damaged_config_is_refused(corpus, stopped):
    for content in ("{", "[]", ""):
        (stopped / "config.json").write_text(content)
        assert re.search(r"config\.json is (damaged|not readable as JSON).* --repair", refused(tiny.flags(corpus, stopped, **SHORT)))


# no space, no numbers


def disk_with(free: int) -> None:
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=free)


def test_full_disk_is_refused_before_training(corpus, tmp_path):
    said = refused(tiny.flags(corpus, tmp_path / "run", **SHORT), before=partial(disk_with, 1_000_000))
    assert re.search(r"has 1 MB free, \d+ MB are needed", said) and "--work_dir" in said
    tiny.completed(tiny.flags(corpus, tmp_path / "other", **{**SHORT, "max_step": 1}), partial(disk_with, 30_000_000))


def fill_the_disk() -> None:
    """Fills the disk before the third checkpoint."""
    save_file, saves = storage.save_file, []

    def full(tensors, path):
        saves.append(path)
        if len(saves) > 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path)

    storage.save_file = full


def test_a_disk_that_fills_up_later_costs_nothing_that_was_saved(corpus, finished, tmp_path):
    arguments = tiny.flags(corpus, tmp_path / "run", **SHORT)
    run = tiny.run(arguments, fill_the_disk)
    assert run.code == 1 and "step 12 cannot be saved" in run.err and "No space left on device" in run.err
    tiny.completed(arguments)
    tiny.same_run(tmp_path / "run", finished)
    assert "Traceback" not in run.err, run.err


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_are_touched(corpus, tmp_path):
    """The rate is so high that the first update makes the second loss overflow."""
    changes = {**SHORT, "lr": 1e30, "save_interval": 1, "scheduler": "constant", "eval_interval": 100}
    said = refused(tiny.flags(corpus, tmp_path, **changes), code=1)
    last = tiny.checkpoints(tmp_path)[-1]
    step = int(last.name.removeprefix("step-"))
    assert f"not finite at step {step}: " in said and "lr 1e+30" in said and f"last good checkpoint: {last}" in said
    assert re.search(r"loss (nan|inf|[\d.e+]+), gradient norm (nan|inf)", said) and "try a smaller --lr" in said
    assert not (tmp_path / "result.json").exists() and all(line["step"] <= step for line in tiny.metrics(tmp_path))
    weights = load_file(last / "model.safetensors")
    said_again = refused(tiny.flags(corpus, tmp_path, **changes), code=1)
    assert said_again == said
    assert all(torch.equal(tensor, load_file(last / "model.safetensors")[name]) for name, tensor in weights.items())


def test_a_validation_that_is_not_finite_is_a_training_error_too(corpus, tmp_path):
    """The last update ruins the model, so no best checkpoint remains to be tested."""
    said = refused(tiny.flags(corpus, tmp_path, **{**SHORT, "lr": 1e38, "max_step": 1}), code=1)
    assert "not finite" in said and "step-00000000" not in said
