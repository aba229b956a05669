"""Run folders that cannot be written, and refusals of other runs: one sentence, and nothing is left behind."""

import builtins
import errno
import os
import resource

import pytest

from tests import tiny

SHORT = {"method": "dense", "max_step": 2, "eval_interval": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words", train_bytes=2000)


def no_lock() -> None:
    """Lets the disk be full when .lock is made."""
    whole = builtins.open

    def full(path, *arguments, **named):
        if str(path).endswith(".lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return whole(path, *arguments, **named)

    builtins.open = full


def full_disk() -> None:
    """Lets a file have no more than 1,000 bytes, less than config.json and env.json have."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def full_disk_for_the_environment() -> None:
    from utils.training import run_folder

    describe = run_folder.describe_environment

    def filled(engine):
        found = describe(engine)
        full_disk()
        return found | {"more": "x" * 1000}

    run_folder.describe_environment = filled


@pytest.mark.parametrize("before", [no_lock, full_disk, full_disk_for_the_environment])
def test_a_full_disk_leaves_no_folder_behind(before, corpus, tmp_path):
    arguments = tiny.flags(corpus, tmp_path / "new" / "run", **SHORT)
    run = tiny.run(arguments, before)
    assert run.code == 2 and "cannot be written" in run.err and run.err.count("\n") == 1, run
    assert not (tmp_path / "new").exists()


def test_another_run_is_refused_by_the_names_of_the_flags_first(corpus, tmp_path):
    tiny.completed(tiny.flags(corpus, tmp_path, **SHORT))
    said = tiny.run(tiny.flags(corpus, tmp_path, **SHORT | {"lr": 0.5, "seed": 7, "dataset": "x" * 500})).err
    assert "holds another run, of other dataset, lr, seed: dataset was 'words' and is now 'xxx" in said and len(said) < 500
