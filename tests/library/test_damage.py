"""Saved folders under damage and kills: what loads is what was saved, or the folder is refused; nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

import smoe_dropout as sd
from smoe_dropout import manifest
from smoe_dropout.files import writing_tensors
from smoe_dropout.io import CONFIG, WEIGHTS
from smoe_dropout.manifest import LOCKED, MANIFEST, ROOM
from tests.conftest import ROOT
from tests.library.test_misuse import config, model


def sparse(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return sd.moefy(model(), config(router="learned"))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def mixtral(seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return sd.adopt(transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=31, num_hidden_layers=1, **sizes)))


KINDS = {
    "save_model": (sparse, sd.save_model, lambda folder: sd.load_weights(sparse(2), folder)),
    "save_pretrained": (mixtral, lambda made, folder: sd.save_pretrained(made, folder, max_shard_size="8KB"), sd.from_pretrained),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """Two models, the folders with them, and the function that loads one."""
    if request.param != "save_model":
        pytest.importorskip("transformers")
    build, save, load = KINDS[request.param]
    models, folder = [build(seed) for seed in (0, 1)], tmp_path_factory.mktemp(request.param)
    for index, made in enumerate(models):
        save(made, folder / str(index))
    return models, folder, load


def test_a_damaged_manifest_is_named(saved, tmp_path):
    """Not the file that it seems to miss, which nobody ever saved."""
    _, folder, load = saved
    shutil.copytree(folder / "0", tmp_path / "damaged")
    path = tmp_path / "damaged" / MANIFEST
    path.write_text(path.read_text().replace("config.json", "confih.json"))
    with pytest.raises(sd.ConfigError, match=r"manifest\.json is damaged"):
        load(tmp_path / "damaged")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_folder_is_refused_or_is_what_was_saved(saved, data):
    models, folder, load = saved
    damaged = folder / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder / "0", damaged)
    path = data.draw(st.sampled_from(sorted(path for path in damaged.iterdir() if path.suffix != ".py")))
    whole, how = path.read_bytes(), data.draw(st.sampled_from(["flip", "truncate", "delete", "swap"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if how == "delete":
        path.unlink()
    elif how == "swap":
        shutil.copy(folder / "1" / path.name, path)
    else:
        flipped = bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) if how == "flip" else b""
        path.write_bytes(whole[:place] + flipped + (whole[place + 1 :] if how == "flip" else b""))
    try:
        assert same(load(damaged), models[0])
    except sd.ConfigError as error:
        assert str(damaged) in str(error) and "\n" not in str(error)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("before", [None, "whole", "older"])
def test_a_killed_save_is_refused_or_whole_and_can_be_repeated(before, tmp_path, monkeypatch):
    """At each of its operations on files."""
    operations = [(manifest.os, "replace"), (manifest.os, "fsync"), (manifest.Path, "unlink"), (manifest, "sha256")]
    old, new, read = (sparse(seed) for seed in range(3))
    for last in range(30):
        folder, calls = tmp_path / str(last), []
        if before:
            sd.save_model(old, folder)
            if before == "older":
                (folder / MANIFEST).unlink()

        def counted(real, last=last, calls=calls):
            def call(*arguments, **named):
                calls.append(real)
                if len(calls) > last:
                    raise Killed
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for place, name in operations:
                patch.setattr(place, name, counted(getattr(place, name)))
            try:
                sd.save_model(new, folder)
                ended = True
            except Killed:
                ended = False
        try:
            sd.load_weights(read, folder)
            assert same(read, new) if ended else before and same(read, old)
        except sd.ConfigError:
            assert not ended
        sd.save_model(new, folder)
        assert same(sd.load_weights(read, folder), new)
        assert sorted(os.listdir(folder)) == sorted([MANIFEST, WEIGHTS, CONFIG])
        if ended:
            break
    assert ended and last > 5


SAVES = "import sys, time\nfrom pathlib import Path\nfrom smoe_dropout.manifest import room\n"
SAVES += "with room(Path(sys.argv[1])) as made:\n    (made / 'part').write_text('x')\n    print(made.name, flush=True)\n    time.sleep(60)"


@pytest.mark.skipif(os.name != "posix", reason="locks of folders are those of POSIX systems")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", SAVES, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    try:
        killed, living = (process.stdout.readline().strip() for process in processes)
        assert killed.startswith(LOCKED) and living.startswith(LOCKED)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        older, recent, other = (tmp_path / f"{ROOM}{name}" for name in ("older", "recent", "file"))  # of version 0.1, without locks
        older.mkdir()
        recent.mkdir()
        other.write_text("mine")
        os.utime(older, (time.time() - 2 * manifest.ABANDONED,) * 2)
        sd.save_model(sparse(0), tmp_path)
        assert {path.name for path in tmp_path.glob(f"{ROOM}*")} == {living, recent.name, other.name}
        assert (tmp_path / living / "part").exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_folders_of_another_kind_are_not_overwritten(tmp_path):
    (tmp_path / MANIFEST).write_text('{"model.safetensors": {"bytes": 3, "sha256": "00"}}')
    with pytest.raises(sd.ConfigError, match=r"holds another manifest\.json: choose a new folder"):
        sd.save_model(sparse(0), tmp_path)
    assert os.listdir(tmp_path) == [MANIFEST]


def test_whoever_may_read_files_of_the_process_may_read_its_saves(saved, tmp_path):
    """A mode that the user gave to a file stays, and so does the file if it cannot be replaced."""
    (tmp_path / "other").write_text("")
    usual = (tmp_path / "other").stat().st_mode
    assert {path.stat().st_mode for path in (saved[1] / "0").iterdir()} == {usual}
    with writing_tensors(path := tmp_path / "tensors"):
        path.unlink()
        os.close(os.open(path, os.O_CREAT, 0o600))
    assert path.stat().st_mode == usual
    path.chmod(0o640)
    with pytest.raises(OSError, match="tensors"), writing_tensors(path):
        raise SafetensorError("I/O error: os error 28")
    assert path.exists()
    with writing_tensors(path):
        path.write_bytes(b"")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_the_earlier_save(tmp_path):
    """A limit on the size of files stands for it."""
    resource = pytest.importorskip("resource")
    sd.save_model(sparse(0), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            sd.save_model(sparse(1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(sd.load_weights(sparse(2), tmp_path), sparse(0)) and len(os.listdir(tmp_path)) == 3


def test_a_checkpoint_of_a_run_has_its_own_manifest(tmp_path):
    sd.save_model(sparse(0), tmp_path, manifest=False)
    assert sorted(os.listdir(tmp_path)) == sorted([WEIGHTS, CONFIG])
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / MANIFEST).write_text("the run's")
    assert same(sd.load_weights(sparse(1), tmp_path), sparse(0))
