"""The JSON files of a run's folder, and whether they belong together. Imports no torch.

config.json is the run's identity: result.json, surgery.json, env.json and every checkpoint carry its `config_sha256`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from msgspec import UNSET, Struct, UnsetType

from smoe_dropout.manifest import sha256
from utils import documents
from utils.documents import Content, Count, Damaged, Sha256
from utils.errors import UserError
from utils.flags.check import check_limits
from utils.flags.declare import ABSENT, flags_from, specs
from utils.flags.fields import FinetuneFlags, Flags, defaults_before, names

REPAIR = "restore it from a copy, or run the command of the run with --repair, which continues without it"
CONFIG, RESULT, SURGERY, ENVIRONMENT, METRICS = "config.json", "result.json", "surgery.json", "env.json", "metrics.jsonl"
CALIBRATION = "calibration.safetensors"  # in a folder of surgery.py: what an operation was decided by
MODEL = "model"  # the folder with what a run of a model of transformers has made, as transformers reads it
LOCK = ".lock"  # held by the process that writes the folder
BEGUN = {LOCK, ".config.json.partial", "config.partial"}  # what a killed process may leave in a folder before its config.json


class Fingerprints(TypedDict, total=False):
    """The entries of config.json that are no flags: hashes of the run's inputs, and the operation of surgery.py."""

    data_fingerprint: Sha256
    vocabulary_sha256: Sha256
    checkpoint_sha256: Sha256
    tokens_sha256: Sha256  # of a task's rows in word pieces; runs of older versions do not have it
    teacher_sha256: Sha256
    surgery: dict[str, Any]


Operation, Dataset = TypedDict("Operation", {"method": str}), TypedDict("Dataset", {"name": str})


class Pretrained(TypedDict, total=False):
    operations: list[Operation]


class Result(Struct):
    """The entries of result.json by which a run is continued or evaluated. Older ones lack the hashes."""

    schema: Count
    status: Literal["complete"]
    best_step: Count
    dataset: Dataset
    pretrained: Pretrained | UnsetType = UNSET
    config_sha256: Sha256 | UnsetType = UNSET
    weights_sha256: Sha256 | UnsetType = UNSET


class Surgery(TypedDict, total=False):
    """The entries of surgery.json that say what was done; those of version 0.1 have other names."""

    trained: dict[str, Any]
    operations: list[Operation]
    source_sha256: Sha256
    config_sha256: Sha256
    calibration_sha256: Sha256


class Line(TypedDict):
    """The entries that every line of metrics.jsonl has."""

    step: Count
    split: str


class Environments(Struct):
    """env.json: how each start of the run was made."""

    starts: list[dict[str, Any]]
    config_sha256: Sha256 | UnsetType = UNSET


def read_config(folder: Path, unverified: Callable[[Path], Any] | None = None) -> dict[str, Any]:
    """The contents of a run's config.json, with the values that newer flags had before. UserError if the folder holds none.

    Damaged unless all its flags are known, of their types, and within their limits. unverified: called with the path of a file without a
    checksum.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} holds no run: {path} is missing")
    remedy = remedy_for(folder)
    config = documents.read(path, Fingerprints, remedy, unverified)
    kind = FinetuneFlags if "task" in config else Flags
    declared = specs(kind)
    needed = {name for name, spec in declared.items() if "unstored" not in spec.roles and spec.since is ABSENT}
    differing = {"without": needed - config.keys(), "with": config.keys() - declared.keys() - Fingerprints.__annotations__.keys()}
    for word, found in differing.items():
        if found:
            raise Damaged(path, f"is damaged: it is {word} {', '.join(sorted(found)[:4])}, as of another version", remedy)
    documents.validate(config, kind, path, remedy)
    config = defaults_before(kind) | config
    started = {name: getattr(Flags, name) for name in names(role="start")}  # without meaning for the trained model
    if mistakes := check_limits(dataclasses.replace(flags_from(config, kind), **started)):
        raise Damaged(path, f"is damaged: {mistakes[0]}", remedy)
    return config


def config_of(flags: Flags, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    stored = {name: value for name, value in dataclasses.asdict(flags).items() if name not in names(role="unstored")}
    return stored | dict(fingerprints)


def config_sha256(config: Mapping[str, Any]) -> str:
    """The identity of a run: a hash of its flags and fingerprints.

    Left out are flags that may differ when it is resumed, and those that have the value of runs made before they existed, so that a new
    flag does not change the identity of an older run.
    """
    before, left_out = defaults_before(FinetuneFlags), names(role="replaceable")
    own = {name: config[name] for name in sorted(config) if name not in left_out}
    return documents.checksum({name: value for name, value in own.items() if name not in before or value != before[name]})


def read_result(folder: Path, identity: str, unverified: Callable[[Path], Any] | None = None) -> dict[str, Any] | None:
    """The record of a run that has ended, None if there is none. Damaged if it is not of the run with this `config_sha256`."""
    if not (path := folder / RESULT).exists():
        return None
    return _belonging(path, documents.read(path, Result, remedy_for(folder), unverified, nullable=True), identity)


def read_surgery(folder: Path, identity: str) -> dict[str, Any]:
    """The content of a folder's surgery.json, without hashes of its other files."""
    content = _surgery(folder, identity)
    return {name: value for name, value in content.items() if name not in ("config_sha256", "calibration_sha256")}


def verify_calibration(folder: Path, identity: str) -> bool:
    """Return whether surgery.json records a calibration. Damaged if that is not the one in the folder."""
    path, known = folder / CALIBRATION, _surgery(folder, identity).get("calibration_sha256")
    if known and (not path.is_file() or sha256(path) != known):
        raise Damaged(path, f"is {'damaged' if path.exists() else 'missing'}: {SURGERY} records another", remedy_for(folder))
    return known is not None


def _surgery(folder: Path, identity: str) -> dict[str, Any]:
    path = folder / SURGERY
    return _belonging(path, documents.read(path, Surgery, remedy_for(folder)), identity)


def read_starts(folder: Path, identity: str) -> list[dict[str, Any]]:
    """The starts of a run, from its env.json."""
    path, remedy = folder / ENVIRONMENT, remedy_of_logs(folder)
    found = documents.parsed(path, remedy)
    found = {"starts": found} if isinstance(found, list) else found  # as version 0.1 wrote it
    return _belonging(path, documents.unsealed(found, Environments, path, remedy), identity)["starts"]


def recorded_metrics(folder: Path, step: int, known: Content | None) -> bytes:
    """The content of metrics.jsonl up to a checkpoint of this step. Damaged if it is not any more what it was then.

    known: its size and hash then; None for a checkpoint of version 0.1, which did not store them.
    """
    path, remedy = folder / METRICS, remedy_of_logs(folder)
    if path.exists() and not path.is_file():
        raise Damaged(path, "is not a file", remedy)
    content = path.read_bytes() if path.exists() else b""
    if known is None:
        texts = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)  # a last line cut by a kill does not count
        lines = documents.lines(b"".join(texts), Line, path, remedy)
        return b"".join(text for text, line in zip(texts, lines, strict=True) if line["step"] <= step)
    recorded = content[: known["bytes"]]
    if len(recorded) < known["bytes"] or hashlib.sha256(recorded).hexdigest() != known["sha256"]:
        fault = f"is {'damaged' if content else 'missing or empty'}: it is not what was recorded up to step {step}"
        raise Damaged(path, fault, remedy)
    return recorded


def _belonging(path: Path, content: dict[str, Any], identity: str) -> dict[str, Any]:
    if content.get("config_sha256", identity) != identity:
        raise Damaged(path, f"belongs to another run than {CONFIG}", remedy_for(path.parent))
    return content


def remedy_of_logs(folder: Path) -> str:
    """Advice for a damaged env.json or metrics.jsonl, which only a run that has not ended reads again."""
    return f"restore it from a copy, or leave it: {RESULT} does not depend on it" if (folder / RESULT).exists() else remedy_for(folder)


def remedy_for(folder: Path) -> str:
    """Advice for a damaged file of a run, or of a folder of surgery.py."""
    return "restore it from a copy, or make the folder again" if (folder / SURGERY).exists() else REPAIR
