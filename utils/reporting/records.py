"""Records of finished runs: one JSON file each, checked when read, kept in results/ under a path that follows from their values."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from utils.errors import UserError
from utils.reporting.labels import Record, method_label, preset_label, slug

Found = Sequence[tuple[Path, Record]]
SCHEMA = 2
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.json"


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _rows(value: object, length: int, second: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and len(row) == length and second(row[1]) for row in value)


TEXTS = "table method preset dataset.name dataset.title dataset.fingerprint metric.name metric.split model.architecture"
# What a value must be: its check, the fields of a record and those of a quality entry. A record may hold more than tables and figures use.
FIELDS: dict[str, tuple[Callable[[object], bool], str, str]] = {
    "a non-empty text": (lambda v: isinstance(v, str) and v.strip() != "", f"{TEXTS} environment.device environment.precision", ""),
    "an object": (_object, "settings preset_settings", ""),
    "a finite number": (_number, "training.seconds training.cpu_seconds", "{split} flops_per_token"),
    "a whole number, 0 or more": (_count, "seed parameters.total training.steps environment.threads", "active_parameters"),
    "a whole number or null": (lambda v: v is None or _count(v), "model.num_experts", "k"),
    "true or false": (lambda v: isinstance(v, bool), "sparse metric.lower_is_better", ""),
    "a non-empty list of objects": (lambda v: isinstance(v, list) and v != [] and all(map(_object, v)), "quality", ""),
    "a list of [step, loss, k, lr]": (lambda v: _rows(v, 4, _number), "curve.train", ""),
    "a list of [step, {k: value}]": (lambda v: _rows(v, 2, _object), "curve.valid", ""),
}


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


def _check(record: Record, path: Path, kind: str, names: str, within: str = "") -> None:
    for name in names.split():
        try:
            value = get(record, name)
        except (KeyError, TypeError):
            raise UserError(f"{path}: the field '{within}{name}' is missing; repeat the run or correct the record") from None
        if not FIELDS[kind][0](value):
            raise UserError(f"{path}: the field '{within}{name}' must be {kind}, not {json.dumps(value)[:80]}")


def read_record(path: Path) -> Record:
    """Reads and checks one record. Of an incomplete run only schema and status are checked."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if schema != SCHEMA:
        older = "; a run of version 0.1 is reported by that version" if schema == 1 else ""
        raise UserError(f"{path}: the field 'schema' is {json.dumps(schema)}, but only schema {SCHEMA} is known{older}")
    _check(record, path, "a non-empty text", "status")
    if record["status"] != "complete":
        return record
    for kind, (_, names, _) in FIELDS.items():
        _check(record, path, kind, names)
    for i, entry in enumerate(record["quality"]):
        for kind, (_, _, names) in FIELDS.items():
            _check(entry, path, kind, names.format(split=split_of(record)), f"quality[{i}].")
    if record["sparse"] and not record["model"]["num_experts"]:
        raise UserError(f"{path}: the field 'model.num_experts' must be 1 or more for a sparse method")
    return record


def load_records(results: Iterable[Path], runs: Iterable[Path] = ()) -> list[tuple[Path, Record]]:
    """The complete records: every JSON file under `results` (folders or files) and every result.json under `runs`."""
    paths: dict[Path, None] = {}
    for source, pattern in [*((path, "*.json") for path in results), *((path, "result.json") for path in runs)]:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder of records")
        paths |= dict.fromkeys([source] if source.is_file() else sorted(source.rglob(pattern)))
    kept = []
    for path, record in ((path, read_record(path)) for path in paths if path.name != PUBLISHED.name):
        if record["status"] == "complete":
            kept.append((path, record))
        else:
            print(f"skipped {path}: its status is '{record['status']}'", file=sys.stderr)
    return kept


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
    return slug(f"{name}-{preset}")


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
    for path in (run / "result.json" for run in runs):
        record = read_record(path)
        if record["status"] != "complete":
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
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return list(planned)
