"""Programs that are stopped: killed at an operation on files, interrupted, without room on the disk, or without a reader of their output.

Each is then started again by the same command, and must end as if nothing had happened.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.judge import UNCLEAR, UNFINISHED, Failure, broken, judge_refusal, judge_result
from tests.faults.programs import Fault, fill, handles_signals, run, run_plainly
from tests.faults.world import JOBS, WRITING, World

SIZE = 64 << 20  # bytes of a small disk: programs want 16 MB free at their start
MARKS = ("", "libtorch_cpu", "libtorch_python")  # parts of imports, seen in a process's memory; the first is their beginning
ENDED = {"SIGINT": (130, -signal.SIGINT), "SIGTERM": (143, -signal.SIGTERM)}
STEPS = "*/checkpoints/step-*"  # a signal makes a checkpoint where it comes


def again(world: World, name: str, tree: Path, loose: str = "") -> list[Failure]:
    """The same command, undisturbed."""
    return judge_result(JOBS[name], world.wanted(name), tree, run(JOBS[name].command, tree, log=tree.parent / "again"), loose=loose)


# kills


def kills(world: World, seed: int) -> Iterator[str]:
    """Every operation on files of every program that writes; in the middle of writing a file; at times the next start is killed too."""
    for name in WRITING:
        for number, operation in enumerate(world.operations(name), start=1):
            yield f"kill:{name}:{number}:kill"
            yield from [f"kill:{name}:{number}:half"] if operation.endswith(" half") else []
            yield from [f"kill:{name}:{number}:twice"] if number % 8 == 0 else []


def kill(world: World, label: str, at: Path, seed: int) -> list[Failure] | None:
    _, name, number, act = label.split(":")
    tree = world.folder(JOBS[name], at / "tree")
    killed = run(JOBS[name].command, tree, Fault(act, int(number)))
    if killed.code != -signal.SIGKILL:  # None: there was one operation fewer than before
        return broken(killed) or ([Failure(UNFINISHED, killed.err[-200:])] if killed.code else None)
    if act == "twice":
        run(JOBS[name].command, tree, Fault("kill", random.Random(f"{seed}:{label}").randint(1, 25)))
    return again(world, name, tree)


# disks


def disks(world: World, seed: int) -> Iterator[str]:
    """A disk that is full from an operation on, at 60 places over all programs; one that is small or read-only from the start."""
    draw = random.Random(seed)
    places = [(name, number) for name in WRITING for number in range(1, len(world.operations(name)) + 1)]
    yield from (f"disk:{name}:{number}:{draw.choice((0, 0, 4096, 16384))}" for name, number in sorted(draw.sample(places, 60)))
    yield from (f"disk:{name}:0:{left}" for name in ("train", "merge", "prepare") for left in (0, 8192, 1 << 20, 12 << 20))
    yield from (f"disk:{name}:0:read-only" for name in WRITING)


def disk(world: World, label: str, at: Path, seed: int) -> list[Failure] | None:
    """On a tmpfs; where that cannot be mounted, no file may grow beyond its first bytes."""
    _, name, number, left = label.split(":")
    job, small, fault = JOBS[name], at / "small", None
    small.mkdir(parents=True)
    mounted = mount(small, f"size={SIZE}")
    if left == "read-only" and not mounted:
        return None
    try:
        tree, filler = world.folder(job, small / "tree"), small / "filler"
        if left == "read-only":
            mount(small, "remount,ro")
        elif number == "0" and mounted:
            fill(filler, int(left))
        else:
            fault = Fault("fill" if mounted else "size", max(1, int(number)), str(filler), int(left))
        finished = run(job.command, tree, fault, log=at / "log")
        if left == "read-only":
            mount(small, "remount,rw")
        filler.unlink(missing_ok=True)
        names = [*(made.partition(".")[0] for made in (job.makes or "run").split()), f"{tree} has"]
        return (judge_refusal(finished, names) if finished.code else broken(finished)) or again(world, name, tree)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", small], check=True)


def mount(folder: Path, options: str) -> bool:
    """Mounts a small disk on a folder, if this process may."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


# signals


def signals(world: World, seed: int) -> Iterator[str]:
    """Both signals at operations on files, at moments of the run, and in the imports of true processes."""
    draw = random.Random(seed)
    for name in WRITING:
        for which in ENDED if name not in ("save", "dense") else ():
            count = len(world.operations(name))
            yield from (f"signal:{name}:{which}:at:{number}" for number in sorted(draw.sample(range(1, count + 1), min(count, 6))))
            yield from (f"signal:{name}:{which}:after:{draw.random():.3f}" for _ in range(4))
    for name in ("train", "evaluate", "merge", "prepare", "generate", "collect", "prepare_pieces"):
        yield from (f"signal:{name}:{which}:import:{mark}+{draw.random():.2f}" for which in ENDED for mark in MARKS)


def interrupt(world: World, label: str, at: Path, seed: int) -> list[Failure]:
    _, name, which, how, moment = label.split(":")
    job, number, tree = JOBS[name], getattr(signal, which), world.folder(JOBS[name], at / "tree")
    if how == "at":
        finished = run(job.command, tree, Fault(int(number), int(moment)))
    elif how == "after":
        finished = run(job.command, tree, after=(number, float(moment) * world.wanted(name)["wall"]))
    else:
        finished = run_plainly(job.command, tree, lambda process: send_at(process, *moment.split("+"), number))
    if found := broken(finished):
        return found
    if finished.code not in (0, *ENDED[which]):
        return [Failure(UNCLEAR, f"exit code {finished.code}: {finished.err[-200:]!r}")]
    return again(world, name, tree, loose=STEPS)


def send_at(process: subprocess.Popen, mark: str, delay: str, number: int) -> None:
    """Sends a signal so many seconds after a program has begun and has mapped a library of this name, or when it ends."""
    while process.poll() is None and not (handles_signals(process.pid) and mark in Path(f"/proc/{process.pid}/maps").read_text()):
        time.sleep(0.005)
    time.sleep(float(delay))
    process.send_signal(number)


# pipes


def pipes(world: World, seed: int) -> Iterator[str]:
    """A reader that goes away after some lines, as head does."""
    for name in ("train", "resume", "merge", "evaluate", "generate", "page", "prepare", "prepare_task", "finetune", "collect"):
        yield from (f"pipe:{name}:{lines}:forked" for lines in (0, 1, 3, 9))
    yield from (f"pipe:{name}:{lines}:plain" for name in ("train", "generate") for lines in (0, 2))


def pipe(world: World, label: str, at: Path, seed: int) -> list[Failure]:
    _, name, lines, how = label.split(":")
    job, tree = JOBS[name], world.folder(JOBS[name], at / "tree")
    if how == "plain":
        finished = run_plainly(job.command, tree, lambda process: close_after(process, int(lines)))
    else:
        finished = run(job.command, tree, lines=int(lines))
    if found := broken(finished):
        return found
    if finished.code not in (0, 141, -signal.SIGPIPE) or re.search(r"error: |Exception|Broken pipe", finished.err):
        return [Failure(UNCLEAR, f"exit code {finished.code}: {finished.err[-200:]!r}")]
    return again(world, name, tree)


def close_after(process: subprocess.Popen, lines: int) -> None:
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
