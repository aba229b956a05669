"""A sample of the fault campaign, and the campaign's own means."""

import pytest

from tests import tiny
from tests.faults.campaign import campaign, report
from tests.faults.damage import READERS
from tests.faults.programs import run_plainly
from tests.faults.world import JOBS, World, contents

SEED = 2303
SAMPLES = {"kill": 16, "damage": len(READERS), "disk": 6, "signal": 6, "pipe": 4}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """One folder for all processes of these tests."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "faults"


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_of_the_campaign(kind, root):
    outcomes = campaign(root, [kind], SAMPLES[kind], SEED, 1, print)
    assert len(outcomes) == SAMPLES[kind]
    assert not any(failures for _, failures in outcomes), report(outcomes, SEED, 0)


def test_a_forked_program_does_what_a_process_of_its_own_does(root, tmp_path):
    tiny.call(World.done, World(root), "train")
    tree = World(root).folder(JOBS["train"], tmp_path / "tree")
    assert run_plainly(JOBS["train"].command, tree).code == 0
    assert contents(tree) == World(root).wanted("train")["files"]
