"""Records of finished runs: one sealed JSON file each, verified when read, kept in results/ under a path that follows from their values."""

import fnmatch
import os
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from msgspec import UNSET, Struct, UnsetType, defstruct

from utils import documents
from utils.checkpoints.run_files import CONFIG, RESULT, config_sha256, read_config, read_result
from utils.errors import UserError
from utils.reporting.labels import Record, method_label, preset_label, slug
from utils.reporting.pages import writing
from utils.training.record_schema import COMPLETE, SCHEMA, Complete, Head, Settings, Text, contradiction, measured_on

Found = Sequence[tuple[Path, Record]]
REMEDY = "restore it from a copy or from version control, or write it again by its run"
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.json"


class Published(Struct):
    """A number of a paper, and the rows beside which it stands."""

    table: Text
    method: Text
    settings: Settings
    architecture: Text
    dataset: Text
    metric: Text
    values: dict[str, float]
    source: Text
    setting: Text | UnsetType = UNSET
    note: str = ""


@cache
def read_published(path: Path = PUBLISHED) -> list[dict[str, Any]]:
    """The entries of a published.json, such as that of results/, which is written by hand."""
    schema = defstruct("File", [("entries", list[Published])])
    return documents.read(path, schema, "correct it, or restore it from version control")["entries"]


def split_of(record: Record) -> str:
    """The split whose quality a table shows."""
    return record["metric"]["split"]


def replicate(record: Record) -> tuple[int, int]:
    """Seed and fold, 0 without folds: the only difference between runs of one row."""
    return record["seed"], record.get("fold") or 0


def get(record: Record, name: str):
    """The value at a dotted name; KeyError or TypeError where a part of it is missing."""
    value = record
    for part in name.split("."):
        value = value[part]
    return value


def read_record(path: Path, unverified: Callable[[Path], object] | None = None) -> Record:
    """Reads one record and verifies its checksum and its fields; of an unfinished run only schema and status. UserError for a damaged one.

    unverified: called with the path of a record without a checksum, by an older version.
    """
    record = documents.read(path, Head, REMEDY, unverified)
    if record["schema"] != SCHEMA:
        older = "; a run of version 0.1 is reported by that version" if record["schema"] == 1 else ""
        raise UserError(f"{path}: the field 'schema' is {record['schema']}, but only schema {SCHEMA} is known{older}")
    if record["status"] == COMPLETE:
        documents.validate(record, Complete, path, REMEDY)
        documents.validate(record, measured_on(split_of(record)), path, REMEDY)
        if fault := contradiction(record):
            raise documents.Damaged(path, f"is damaged: {fault}", REMEDY)
    return record


def load_records(results: Iterable[Path], runs: Iterable[Path] = ()) -> list[tuple[Path, Record]]:
    """The complete records: every JSON file under `results` (folders or files) and every result.json under `runs`."""
    paths: dict[Path, None] = {}
    for source, pattern in [*((path, "*.json") for path in results), *((path, "result.json") for path in runs)]:
        paths |= dict.fromkeys(files_below(source, pattern))
    found = [(path, read_record(path, documents.note_unverified)) for path in paths if path.name != PUBLISHED.name]
    for path, record in found:
        if record["status"] != COMPLETE:
            print(f"skipped {path}: its status is '{record['status']}'", file=sys.stderr)
    return [(path, record) for path, record in found if record["status"] == COMPLETE]


def files_below(source: Path, pattern: str) -> list[Path]:
    """The file itself, or those below a folder. UserError for what is missing or cannot be read."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename or source}: no file or folder of records that can be read ({error.strerror})") from None

    try:
        if not stat.S_ISDIR(source.stat().st_mode):
            return [source]
        walked = os.walk(source, onerror=refuse)
        return sorted(Path(folder, name) for folder, *names in walked for name in fnmatch.filter(chain(*names), pattern))
    except OSError as error:
        refuse(error)


def data_stem(record: Record, short: bool = False) -> str:
    """Data and preset as part of a file name. short: the model's name in place of the tokenizer's."""
    name, settings = record["dataset"]["name"], dict(record["preset_settings"])
    if record.get("pretrained"):  # the number of further steps belongs to the row
        settings.pop("max_step", None)
    if short and "pieces" in record["dataset"]:
        name = f"{record['model']['architecture']}-{name.partition('-')[0]}"
    preset = preset_label(record["preset"], settings)
    if len(preset) > 60:  # file systems limit a name
        preset = f"{record['preset']}-{sha256(preset.encode()).hexdigest()[:8]}"
    return slug(name if name.endswith(f"-{preset}") else f"{name}-{preset}")


def place(record: Record) -> Path:
    """The path of a record below results/table1, table2 or surgery: a folder for its row, then `file_name`."""
    start = record.get("pretrained", {})
    row = ("whole " if start and record["table"] == "surgery" else "") + method_label(record, record["method"])
    if operations := start.get("operations"):
        row = " ".join([*map(_short, operations), *(["taught"] if "teacher" in start else [])])
    return Path(slug(row)) / file_name(record)


def _short(operation: Record) -> str:
    if operation["method"] == "train":
        return " ".join(["pruned"] * ("pruned_to" in operation) + ["taught"] * operation.get("taught", False)) or "trained"
    task = (operation.get("read") or {}).get("task")
    return " ".join(str(part) for part in (operation["method"], operation.get("keep"), task) if part)


def file_name(record: Record) -> str:
    """Data, preset, the trained model that a run started from, fold and seed."""
    start = record.get("pretrained")
    model = [(start.get("surgery", {}).get("source_sha256") or start["sha256"])[:4]] if start else []
    fold = [f"fold{record['fold']}"] if record.get("fold") is not None else []
    return "-".join([data_stem(record), *model, *fold, f"seed{record['seed']}"]) + ".json"


def collect(runs: Iterable[Path], place: Callable[[Record], Path], force: bool = False) -> list[Path]:
    """Copies finished runs' records to their places; writes nothing if one of them is refused."""
    planned: dict[Path, tuple[Path, Record]] = {}
    found = []
    for run in runs:
        found.append((run / RESULT, read_record(run / RESULT, documents.note_unverified)))
        if (run / CONFIG).exists():
            read_result(run, config_sha256(read_config(run)))  # refuses that of another run
    for path, record in found:
        if record["status"] != COMPLETE:
            raise UserError(f"{path}: the run's status is '{record['status']}'; only a complete run can be collected")
        try:
            target = place(record)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if target in planned and planned[target][1] != record:
            raise UserError(f"{path}: would get the same name as {planned[target][0]}, {target}; collect only one of the two")
        if target.exists() and not force and read_record(target) != record:
            raise UserError(f"{target}: holds another run than {path}; give --force to replace it")
        planned[target] = (path, record)
    for target, (_, record) in planned.items():
        with writing(target):
            documents.write(target, record)
    return list(planned)
