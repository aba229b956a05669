"""Records of finished runs: one JSON file each, checked when read, kept in results/ under a path that follows from their values."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from utils.checkpoints import schema_1
from utils.errors import UserError
from utils.reporting.labels import Record, method_label, operation_name, preset_label, slug

SCHEMA = 2
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.json"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


KINDS: dict[str, Callable[[object], bool]] = {
    "a non-empty text": lambda v: isinstance(v, str) and bool(v.strip()),
    "a finite number": _is_number,
    "a whole number, 0 or more": _is_count,
    "a whole number or null": lambda v: v is None or _is_count(v),
    "true or false": lambda v: isinstance(v, bool),
    "an object": lambda v: isinstance(v, dict),
    "a non-empty list of objects": lambda v: bool(v) and _is_list_of(v, lambda e: isinstance(e, dict)),
    "a list of [step, loss, k, lr]": lambda v: _is_list_of(v, lambda e: isinstance(e, list) and len(e) == 4 and _is_number(e[1])),
    "a list of [step, {k: value}]": lambda v: _is_list_of(v, lambda e: isinstance(e, list) and len(e) == 2 and isinstance(e[1], dict)),
}
# Only what the tables and figures use, by kind: a record may hold more.
TEXTS = "table method preset dataset.name dataset.title dataset.fingerprint metric.name metric.split model.architecture"
RECORD_FIELDS = {
    "a non-empty text": f"{TEXTS} environment.device environment.precision",
    "an object": "settings preset_settings",
    "a finite number": "training.seconds training.cpu_seconds",
    "a whole number, 0 or more": "seed parameters.total training.steps environment.threads",
    "a whole number or null": "model.num_experts",
    "true or false": "sparse metric.lower_is_better",
    "a non-empty list of objects": "quality",
    "a list of [step, loss, k, lr]": "curve.train",
    "a list of [step, {k: value}]": "curve.valid",
}
QUALITY_FIELDS = {
    "a whole number or null": "k",
    "a finite number": "{split} flops_per_token",
    "a whole number, 0 or more": "active_parameters",
}


def split_of(record: Record) -> str:
    """The split whose quality a table shows."""
    return record["metric"]["split"]


def replicate(record: Record) -> tuple[int, int]:
    """The seed, and the fold where there are folds: runs of one row differ in nothing else."""
    return record["seed"], record.get("fold") or 0


def get(record: Record, name: str):
    """The value at a dotted name; KeyError where a part of it is missing."""
    value = record
    for part in name.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[part]
    return value


def _check_fields(record: Record, fields: dict[str, str], path: Path, within: str = "") -> None:
    for kind, names in fields.items():
        for name in names.split():
            try:
                value = get(record, name)
            except KeyError:
                raise UserError(f"{path}: the field '{within}{name}' is missing; repeat the run or correct the record") from None
            if not KINDS[kind](value):
                raise UserError(f"{path}: the field '{within}{name}' must be {kind}, not {json.dumps(value)[:80]}")


def read_record(path: Path) -> Record:
    """Reads and checks one record; one of the version before is converted. Of an incomplete run only schema and status are checked."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(record, dict) or record.get("schema") not in (1, SCHEMA):
        found = json.dumps(record.get("schema")) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: the field 'schema' is {found}, but only schema {SCHEMA} is known")
    _check_fields(record, {"a non-empty text": "status"}, path)
    if record["status"] != "complete":
        return record
    if record["schema"] == 1:
        try:
            record = schema_1.record(record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: is no whole record of schema 1 ({error}); repeat the run") from None
    _check_fields(record, RECORD_FIELDS, path)
    fields = {kind: names.format(split=split_of(record)) for kind, names in QUALITY_FIELDS.items()}
    for i, entry in enumerate(record["quality"]):
        _check_fields(entry, fields, path, f"quality[{i}].")
    if record["sparse"] and not record["model"]["num_experts"]:
        raise UserError(f"{path}: the field 'model.num_experts' must be 1 or more for a sparse method")
    return record


def find_records(results: Iterable[Path], runs: Iterable[Path]) -> list[Path]:
    """Record files: every JSON file under `results` (folders or files) and every result.json under `runs`."""
    found = []
    for source, pattern in [*((p, "*.json") for p in results), *((p, "result.json") for p in runs)]:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder of records")
        found += [source] if source.is_file() else sorted(p for p in source.rglob(pattern) if p.name != PUBLISHED.name)
    return list(dict.fromkeys(found))


def load_records(paths: Iterable[Path]) -> list[tuple[Path, Record]]:
    """The complete records; one of an unfinished run is named on stderr."""
    kept = []
    for path in paths:
        record = read_record(path)
        if record["status"] == "complete":
            kept.append((path, record))
        else:
            print(f"skipped {path}: its status is '{record['status']}'", file=sys.stderr)
    return kept


def data_stem(record: Record, short: bool = False) -> str:
    """Data and preset as part of a file name. short: a text of word pieces without the name of its pieces, which its model stands for."""
    name, settings = record["dataset"]["name"], dict(record["preset_settings"])
    if record.get("pretrained"):  # for how long a run went on is said by its row
        settings.pop("max_step", None)
    if "pieces" in record["dataset"]:
        name = f"{record['model']['architecture']}-{name.partition('-')[0]}" if short else name
    preset = preset_label(record["preset"], settings)
    if len(preset) > 60:  # file systems limit a name
        preset = f"{record['preset']}-{sha256(preset.encode()).hexdigest()[:8]}"
    return slug(f"{name}-{preset}")


def place(record: Record) -> Path:
    """The path of a record in the folder of Table 1, Table 2 or surgery; its row is a short label."""
    start = record.get("pretrained", {})
    row = ("whole " if start and record["table"] == "surgery" else "") + method_label(record, record["method"])
    if operations := start.get("operations"):
        row = " ".join([*map(_short, operations), *(["taught"] if "teacher" in start else [])])
    return Path(slug(row)) / file_name(record)


def _short(operation: dict) -> str:
    if operation["method"] == "train":
        return " ".join(["pruned"] * ("pruned_to" in operation) + ["taught"] * operation.get("taught", False)) or "trained"
    read = operation.get("read") or {}
    words = [operation_name(operation["method"]), str(operation["keep"]) if "keep" in operation else "", read.get("task") or ""]
    return " ".join(filter(None, words))


def file_name(record: Record) -> str:
    """Data, preset, the trained model that a run started from, fold and seed."""
    start = record.get("pretrained")
    model = [(start.get("surgery", {}).get("source_sha256") or start["sha256"])[:4]] if start else []
    fold = [f"fold{record['fold']}"] if record.get("fold") is not None else []
    return "-".join([data_stem(record), *model, *fold, f"seed{record['seed']}"]) + ".json"


def collect(runs: Iterable[Path], place: Callable[[Record], Path], force: bool = False) -> list[Path]:
    """Copies finished runs' records to their places in results/; nothing is written if one of them is refused.

    place: the path that follows from a record's values.
    """
    planned: dict[Path, tuple[Path, Record]] = {}
    for run in runs:
        path = run / "result.json"
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
