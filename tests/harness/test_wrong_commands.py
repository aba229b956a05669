"""A sample of the wrong command lines; `python -m tests.harness.wrong_commands` tries them all in processes of their own."""

import random

import pytest

from tests.harness import wrong_commands
from tests.harness.wrong_commands import BY_PROCESS, WRITTEN, faults, generated, here, listing, process, written

SAMPLE, PROCESSES = 250, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    wrong_commands.make(folder)
    return folder


def test_wrong_command_lines_are_one_sentence_each(place, monkeypatch):
    """Exit code 2, one line that names the flag, and nothing is written."""
    monkeypatch.chdir(place)
    cases = [*written(WRITTEN), *random.Random(0).sample(list(generated()), SAMPLE)]
    before = listing(place)
    found = {case.name: (wrong, answer.err) for case in cases if (wrong := faults(case, answer := here(case)))}
    assert not {name: wrong for name, wrong in found.items() if wrong[0] != ["slow"]}
    assert listing(place) == before and len(cases) > 350


def test_wrong_command_lines_of_scripts(place, monkeypatch):
    monkeypatch.chdir(place)
    cases = random.Random(0).sample(list(written(BY_PROCESS)), PROCESSES)
    found = {case.name: (wrong, answer.err) for case in cases if (wrong := faults(case, answer := process(case)))}
    assert not {name: wrong for name, wrong in found.items() if wrong[0] != ["slow"]}
