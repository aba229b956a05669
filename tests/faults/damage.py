"""Damaged files: every file that a job reads, in every manner, and what the job may answer."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.judge import Failure, forgive_lost, judge_doctor, judge_refusal, judge_result, names_in
from tests.faults.programs import run
from tests.faults.world import JOBS, READING, World, copy

READERS = ("train", "train_bert", "finetune", "merge", "microscope", "collect", *READING)
WORDS = ("null", "true", "-1", "1e999", "NaN", '"1"', "[]", "{}", "9" * 25)  # in place of a value in JSON


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def change(pattern: str, into: Callable[[str, random.Random], str]) -> Callable[[bytes, random.Random], bytes]:
    """A manner that replaces one match of a pattern in a text."""

    def manner(content: bytes, draw: random.Random) -> bytes:
        text = content.decode()
        if not (found := list(re.finditer(pattern, text))):
            return content
        match = draw.choice(found)
        return (text[: match.start()] + into(match.group(), draw) + text[match.end() :]).encode()

    return manner


def lines(copies: int) -> Callable[[bytes, random.Random], bytes]:
    """A manner that leaves so many copies of one line."""

    def manner(content: bytes, draw: random.Random) -> bytes:
        parts = content.splitlines(keepends=True)
        place = draw.randrange(len(parts))
        return b"".join([*parts[:place], *[parts[place]] * copies, *parts[place + 1 :]])

    return manner


def drop_field(content: bytes, draw: random.Random) -> bytes:
    """One entry of an object at any depth is left out; the file is laid out anew."""
    values = [json.loads(line) for line in content.splitlines()] if b"}\n{" in content else [json.loads(content)]
    if objects := [value for value in nested(values) if isinstance(value, dict) and value]:
        chosen = draw.choice(objects)
        chosen.pop(draw.choice(list(chosen)))
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def nested(value: object) -> Iterator[object]:
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(child)


CONTENT = {
    **dict.fromkeys(("flip", "flip2"), flip),
    "truncate": lambda content, draw: content[: draw.randrange(len(content))],
    "empty": lambda content, draw: b"",
    "append": lambda content, draw: content + draw.randbytes(draw.choice((1, 8, 100))),
}
JSON = {
    "digit": change(r"\d", lambda digit, draw: draw.choice("0123456789".replace(digit, ""))),
    "letter": change(r"[a-z]", lambda letter, draw: draw.choice("qxz".replace(letter, "a"))),
    "key": change(r'"\w+":', lambda key, draw: f'"{key[1:-2]}_":'),
    "word": change(r"\b(true|false|null|\d+)\b", lambda word, draw: draw.choice(WORDS)),
    "drop_line": lines(0),
    "double_line": lines(2),
    "drop_field": drop_field,
}
PLACE = ("delete", "swap", "folder")


def listed(world: World, seed: int) -> Iterator[str]:
    """Every job x every file it reads x every manner."""
    for name in READERS:
        for need in JOBS[name].needs.split():
            entry, _, inside = need.partition(":")
            root = world.entry(entry.removeprefix("+"))
            for path in [] if need.startswith("+") else [root, *sorted(root.rglob("*"))] if root.is_dir() else [root]:
                manners = PLACE if path.is_dir() else (*CONTENT, *PLACE, *(JSON if path.suffix in (".json", ".jsonl") else ()))
                target = Path(inside or entry, path.relative_to(root)).as_posix()
                chosen = path.is_dir() and (path == root or target in JOBS[name].command)  # by the command, whatever is there
                unknown = path.name == "tokenizer_config.json"  # of transformers, without a checksum, and copied
                if "/tensorboard" not in str(path) and path.name != ".lock" and not chosen and not unknown:
                    yield from (f"damage:{name}:{target}:{manner}" for manner in manners)


def attempt(world: World, label: str, at: Path, seed: int) -> list[Failure] | None:
    """The job, with one file damaged; None where this manner changes nothing."""
    _, name, target, manner = label.split(":")
    job, wanted, tree = JOBS[name], world.wanted(name), world.folder(JOBS[name], at / "tree")
    if not spoil(world, job.needs.split(), tree / target, target, manner, random.Random(f"{seed}:{label}")):
        return None
    before, finished, parts = names_in(tree), run(job.command, tree), Path(target).parts
    names = [parts[-1], *(parts[1:-1] or parts[:-1] if manner in PLACE else ())]  # what is gone or another's may be named by its folder
    if name == "doctor":
        names += parts[:1] if manner in PLACE else ()
        if finished.code in (0, 1):
            return judge_doctor(wanted, tree, finished, f"{target}:{manner}", names)
    if finished.code == 0:
        noted = any(line.startswith("note: ") and parts[-1] in line for line in finished.err.splitlines())
        forgive = forgive_lost if name.startswith("repair") else None
        return judge_result(job, wanted, tree, finished, target, loose=target if noted else "", forgive=forgive)
    left = {name for name in names_in(tree) - before if name not in wanted["files"] or name.split("/")[0] not in before}
    return judge_refusal(finished, names, left)


def spoil(world: World, needs: list[str], path: Path, target: str, manner: str, draw: random.Random) -> bool:
    """Damages a file or folder. False where it is as before."""
    if manner == "swap":
        entry, _, inside = target.partition("/")
        twin = world.entry(next(need.partition(":")[0] for need in needs if need.rpartition(":")[2] == entry), twin=True) / inside
        if not twin.exists() or (twin.is_file() and twin.read_bytes() == path.read_bytes()):
            return False
        remove(path)
        copy(twin, path)
    elif manner in PLACE:
        was_folder = path.is_dir()
        remove(path)
        if manner == "folder":
            path.touch() if was_folder else path.mkdir()
    else:
        before = path.read_bytes()
        path.write_bytes((CONTENT | JSON)[manner](before, draw) if before else b"x")
        return path.read_bytes() != before
    return True


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
