"""Verdicts over what a program did under a fault."""

import fnmatch
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.faults.programs import Finished
from tests.faults.world import Job, contents

SLOW = 2.0  # seconds of CPU in which a refusal must come
WRONG, TRACEBACK, UNNAMED, LEFTOVER = "wrong number", "traceback", "unnamed file", "leftover after the next start"
TOO_SLOW, HANGS, UNFINISHED, UNCLEAR = "answer over 2 s", "hang", "cannot go on", "not one sentence"
UNKNOWABLE = (  # another whole record; a checkpoint that nothing needs; a model without checksums, as earlier versions saved it
    r"results/.*:swap|run/checkpoints/step-0000000[46]:delete|saved/.*/manifest.json:delete"
)
CLASSES = (WRONG, TRACEBACK, UNNAMED, LEFTOVER, TOO_SLOW, HANGS, UNFINISHED, UNCLEAR)


class Failure(NamedTuple):
    kind: str
    detail: str


def broken(finished: Finished) -> list[Failure]:
    """A traceback, a crash or a hang, allowed nowhere."""
    last = (finished.err.strip().splitlines() or [f"exit code {finished.code}"])[-1][:300]
    if finished.code is None:
        return [Failure(HANGS, last)]
    return [Failure(TRACEBACK, last)] if "Traceback (most recent call last)" in finished.err or finished.code in (-6, -7, -11) else []


def judge_refusal(finished: Finished, names: list[str], left: set[str] = frozenset()) -> list[Failure]:
    """A refusal is one line with one of the names, and comes at once. left: names of files that it left in its folder."""
    if found := broken(finished):
        return found
    lines, end = [line for line in finished.err.splitlines() if line.startswith("error: ")], f"...{finished.err[-300:]!r}"
    if finished.code not in (1, 2) or len(lines) != 1 or finished.err.splitlines()[-1] != lines[0]:
        return [Failure(UNCLEAR, f"exit code {finished.code}: {end}")]
    if not any(name in lines[0] for name in names):
        return [Failure(UNNAMED, end)]
    if finished.code == 2 and finished.cpu > SLOW:
        return [Failure(TOO_SLOW, f"{finished.cpu:.1f} s of CPU: {end}")]
    return [Failure(LEFTOVER, f"refused, but leaves {', '.join(sorted(left)[:3])}: {end}")] if finished.code == 2 and left else []


def judge_result(
    job: Job,
    wanted: dict,
    tree: Path,
    finished: Finished,
    passed_over: str = "",
    loose: str = "",
    forgive: Callable[[str, dict, dict], None] | None = None,
) -> list[Failure]:
    """A job that succeeded left what it leaves undisturbed. passed_over: a damaged file, which may stay as it is where the job only reads.

    loose: a pattern of names that may be missing, or be there besides. forgive: makes files alike that may differ.
    """
    if found := broken(finished):
        return found
    if finished.code != 0:
        return [Failure(UNFINISHED, f"exit code {finished.code}: ...{finished.err[-300:]!r}")]
    if job.prints and finished.out != wanted["out"]:
        return [Failure(WRONG, f"prints {finished.out[:80]!r}")]
    owned = passed_over.startswith(tuple(job.makes.split())) and not passed_over.startswith(tuple(job.free.split()))
    found, files = contents(tree), wanted["files"]
    for name in found.keys() | files.keys():
        if (passed_over and not owned and name.startswith(passed_over)) or (
            fnmatch.fnmatch(name, loose) and (name in found) != (name in files)
        ):
            found.pop(name, None), files.pop(name, None)
    if forgive:
        forgive(job.makes, files, found)
    if differing := sorted(name for name in files if found.get(name) != files[name]):
        return [Failure(WRONG, f"{', '.join(differing[:4])}: {difference(files[differing[0]], found.get(differing[0], 'missing'))}")]
    more = sorted(found.keys() - files.keys())
    return [Failure(LEFTOVER, ", ".join(more[:4]))] if more else []


def forgive_lost(work: str, wanted: dict[str, str], found: dict[str, str]) -> None:
    """Takes from both what the record of a repaired run says was lost. Another best checkpoint must be one of the undisturbed run's, with
    its numbers on validation.
    """
    here, there = (json.loads(files[f"{work}/result.json"]) for files in (found, wanted))
    if not (lost := " ".join(here.pop("lost", []))):
        return
    known = {step: quality for step, quality in there["curve"]["valid"]}
    if "metrics.jsonl" in lost:
        for name, curve in there["curve"].items():
            there["curve"][name] = curve[len(curve) - len(here["curve"].get(name, ())) :]
        lines = wanted[f"{work}/metrics.jsonl"].splitlines()
        wanted[f"{work}/metrics.jsonl"] = "\n".join(lines[len(lines) - len(found[f"{work}/metrics.jsonl"].splitlines()) :])
    if "env.json" in lost:
        wanted[f"{work}/env.json"] = found[f"{work}/env.json"]
    if "routing" in lost or "best checkpoint" in lost:
        here.pop("routing"), there.pop("routing")
    if "best checkpoint" in lost:
        there |= {
            "best_step": here["best_step"],
            "weights_sha256": wanted[f"{work}/checkpoints/step-{here['best_step']:08}/model.safetensors"],
        }
        best = known.get(here["best_step"], {})
        there["quality"] = [row | {"valid": best.get(str(row["k"]), row["valid"])} for row in here["quality"]]
    wanted[f"{work}/result.json"], found[f"{work}/result.json"] = json.dumps(there), json.dumps(here)
    for files in (wanted, found):
        for name in (name for name in files if name.endswith("/state.json")):
            state = json.loads(files[name])
            files[name] = json.dumps({key: value for key, value in state.items() if key not in ("lost", "best", "best_step")})


def judge_doctor(wanted: dict, tree: Path, finished: Finished, done: str, names: list[str]) -> list[Failure]:
    """The doctor names what is damaged, or finds nothing where nothing that can be known differs. done: the damaged file, and how."""
    if found := broken(finished):
        return found
    told = [line for line in finished.out.splitlines() if re.search(r": .*(damaged|missing|unfinished|verified)", line)]
    if any(name in line for line in told for name in names):
        return []
    if finished.code == 1:
        return [Failure(UNNAMED, f"{told}")]
    same = re.fullmatch(UNKNOWABLE, done) or contents(tree) == wanted["files"]
    return [] if same else [Failure(WRONG, f"the doctor finds nothing: {told}")]


def difference(wanted: str, found: str) -> str:
    """The first place where two texts differ, with what stands around it."""
    place = next((place for place, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), 0)
    return f"{wanted[max(0, place - 40) : place + 30]!r} is now {found[max(0, place - 40) : place + 30]!r}"


def names_in(tree: Path) -> set[str]:
    """Every file and folder, but for locks."""
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.name != ".lock"}
