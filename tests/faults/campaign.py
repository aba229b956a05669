"""Tries by kind, run in processes side by side, and the report of their failures."""

import random
import shutil
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from tests import tiny
from tests.faults import damage, stops, wrong
from tests.faults.judge import CLASSES, Failure
from tests.faults.world import World


class Kind(NamedTuple):
    """The labels of all tries of a kind, in a fixed order, and the function that makes one."""

    listed: Callable[[World, int], Iterator[str]]
    attempt: Callable[[World, str, Path, int], list[Failure] | None]


KINDS = {
    "kill": Kind(stops.kills, stops.kill),
    "damage": Kind(damage.listed, damage.attempt),
    "wrong": Kind(wrong.listed, wrong.attempt),
    "disk": Kind(stops.disks, stops.disk),
    "signal": Kind(stops.signals, stops.interrupt),
    "pipe": Kind(stops.pipes, stops.pipe),
}


class Outcome(NamedTuple):
    """A try; its failures, None if there was nothing to try."""

    label: str
    failures: list[Failure] | None


def campaign(root: Path, kinds: list[str], sample: int | None, seed: int, jobs: int, say: Callable[[str], None]) -> list[Outcome]:
    """Runs all tries of the kinds, or `sample` of each."""
    outcomes = []
    if "wrong" in kinds:
        wrong.prepare(World(root))
    with ProcessPoolExecutor(jobs, mp_context=tiny._server()) as pool:
        for kind in kinds:
            labels = pool.submit(listed, root, kind, seed).result()
            labels = labels if sample is None else spread(labels, seed)[:sample]
            say(f"{kind}: {len(labels)} tries")
            for number, done in enumerate(as_completed([pool.submit(attempt, root, label, seed) for label in labels]), start=1):
                outcomes.append(done.result())
                said = "; ".join(map(": ".join, outcomes[-1].failures or ()))
                if said or number % 100 == 0:
                    say(f"{number}/{len(labels)} {outcomes[-1].label} {said}")
    return outcomes


def listed(root: Path, kind: str, seed: int) -> list[str]:
    return list(KINDS[kind].listed(World(root), seed))


def spread(labels: list[str], seed: int) -> list[str]:
    """The labels in a random order in which the jobs take turns, so that each is in a sample."""
    by_job = defaultdict(list)
    for label in random.Random(seed).sample(labels, len(labels)):
        by_job[label.split(":")[1]].append(label)
    return [label for label in chain(*zip_longest(*by_job.values())) if label]


def attempt(root: Path, label: str, seed: int, keep: bool = False) -> Outcome:
    """One try, in a folder that is removed afterwards."""
    world, at = World(root), Path(tempfile.mkdtemp(dir=root.absolute(), prefix="try-"))
    try:
        return Outcome(label, KINDS[label.partition(":")[0]].attempt(world, label, at, seed))
    except Exception:  # of the campaign itself: the other tries go on, and this one has failed
        return Outcome(label, [Failure("campaign", traceback.format_exc()[-600:])])
    finally:
        if not keep:
            shutil.rmtree(at, ignore_errors=True)


def report(outcomes: list[Outcome], seed: int, seconds: float) -> str:
    """A table of tries and failures by class, then each failure with the command that repeats it."""
    made = [(label.partition(":")[0], label, failures) for label, failures in outcomes if failures is not None]
    found = sorted((kind, label, *failure) for kind, label, failures in made for failure in failures)
    classes = [*CLASSES, *sorted({one for *_, one, _ in found} - {*CLASSES})]
    tries, counts = Counter(kind for kind, *_ in made), Counter((kind, one) for kind, _, one, _ in found)
    lines = [f"| kind | tries | {' | '.join(classes)} |", f"|---|---|{'---|' * len(classes)}"]
    lines += [f"| {kind} | {tries[kind]} | {' | '.join(str(counts[kind, one]) for one in classes)} |" for kind in tries]
    lines += ["", f"{len(made)} tries in {seconds / 60:.1f} minutes, {len(found)} failures"]
    for this in classes:
        these = [f"- `python -m tests.faults --try {label} --seed {seed}`: {detail}" for _, label, one, detail in found if one == this]
        lines += ["", f"## {this}: {len(these)}", "", *these] if these else []
    return "\n".join(lines) + "\n"
