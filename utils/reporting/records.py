"""Records of finished runs: one JSON file each, checked when read, grouped by what may be compared."""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.json"

Record = dict


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
    "a non-empty list of objects": lambda v: bool(v) and _is_list_of(v, lambda e: isinstance(e, dict)),
    "a list of [step, loss, k, lr]": lambda v: _is_list_of(v, lambda e: isinstance(e, list) and len(e) == 4 and _is_number(e[1])),
    "a list of [step, {k: value}]": lambda v: _is_list_of(v, lambda e: isinstance(e, list) and len(e) == 2 and isinstance(e[1], dict)),
}
# Only what the tables and figures use, by kind: a record may hold more.
TEXTS = "table method title preset dataset.name dataset.title dataset.fingerprint metric.name model.architecture"
RECORD_FIELDS = {
    "a non-empty text": f"{TEXTS} environment.device environment.precision",
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
# Runs of one method are only averaged, and methods of one table only compared, where these agree.
SAME_IN_METHOD = ("training.steps", "model.num_experts")
SAME_IN_GROUP = ("metric.name", "metric.lower_is_better")
SAME_IN_FOLD = ("dataset.fingerprint",)
SAME_IN_METHOD_AND_FOLD = ("parameters.total",)  # a head may depend on what occurs in training


@dataclass
class Method:
    """All runs of one method in a group, one per seed, and of a task with folds one per seed and fold."""

    name: str
    title: str
    sparse: bool
    records: list[Record]


@dataclass
class Group:
    """The methods to be compared: one dataset, one preset, one architecture, one pre-training."""

    dataset: dict
    preset: str
    metric: dict
    methods: list[Method]

    def stem(self, joint: str) -> str:
        """Dataset and preset as part of a file name."""
        return joint.join(map(slug, setting(self.methods[0].records[0])))


def setting(record: Record) -> list[str]:
    """What a file name has to say of a record's dataset and preset, and of what it started from."""
    start = [f"from {pretraining(record)}"] if pretraining(record) else []
    return [record["dataset"]["name"], *named_architecture(record), record["preset"], *start]


def named_architecture(record: Record) -> list[str]:
    """The model, where a data set may be another's too: one of word pieces, or of a task."""
    return [record["model"]["architecture"]] if "pieces" in record["dataset"] or pretraining(record) else []


def pretraining(record: Record) -> str:
    """What a fine-tuned model was pre-trained on; of any other "" """
    return record["pretrained"]["title"] if "pretrained" in record else ""


def split_of(record: Record) -> str:
    """The split whose quality a table shows."""
    return record["metric"].get("split", "test")


def replicate(record: Record) -> tuple[int, int]:
    """What runs of one method differ in: seed, and fold where there are folds."""
    return record["seed"], record.get("fold") or 0


def slug(text: str) -> str:
    """`text` without the characters that a file system may refuse."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


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
                raise UserError(f"{path}: the field '{within}{name}' is missing; repeat the run or mend the record.") from None
            if not KINDS[kind](value):
                raise UserError(f"{path}: the field '{within}{name}' has to be {kind}, not {json.dumps(value)[:80]}.")


def read_record(path: Path) -> Record:
    """Reads and checks one record. Of an incomplete run only schema and status are checked, since the rest may not exist yet."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}).") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = json.dumps(record.get("schema")) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: the field 'schema' is {found}, but only schema {SCHEMA} is known.")
    _check_fields(record, {"a non-empty text": "status"}, path)
    if record["status"] != "complete":
        return record
    _check_fields(record, RECORD_FIELDS, path)
    fields = {kind: names.format(split=split_of(record)) for kind, names in QUALITY_FIELDS.items()}
    for i, entry in enumerate(record["quality"]):
        _check_fields(entry, fields, path, f"quality[{i}].")
    if record["sparse"] and not record["model"]["num_experts"]:
        raise UserError(f"{path}: the field 'model.num_experts' has to be 1 or more for a sparse method.")
    return record


def find_records(results: Iterable[Path], runs: Iterable[Path]) -> list[Path]:
    """Record files: every JSON file under `results` (folders or files) and every result.json under `runs`."""
    found = []
    for source, pattern in [*((p, "*.json") for p in results), *((p, "result.json") for p in runs)]:
        if not source.exists():
            raise UserError(f"{source}: there is no such file or folder of records.")
        found += [source] if source.is_file() else sorted(p for p in source.rglob(pattern) if p.name != PUBLISHED.name)
    return list(dict.fromkeys(found))


def load_records(paths: Iterable[Path], table: str) -> list[tuple[Path, Record]]:
    """Complete records of `table`; what is left out is named on stderr."""
    kept = []
    for path in paths:
        record = read_record(path)
        if record["status"] != "complete":
            print(f"skipped {path}: its status is '{record['status']}'", file=sys.stderr)
        elif record["table"] != table:
            print(f"skipped {path}: it belongs to '{record['table']}', not '{table}'", file=sys.stderr)
        else:
            kept.append((path, record))
    return kept


def _check_same(one: tuple[Path, Record], other: tuple[Path, Record], names: Iterable[str], purpose: str) -> None:
    for name in names:
        a, b = get(one[1], name), get(other[1], name)
        if a != b:
            raise UserError(f"{other[0]}: '{name}' is {b!r}, but {a!r} in {one[0]}; {purpose}.")


def group_records(found: list[tuple[Path, Record]]) -> list[Group]:
    """Groups by dataset title, preset, architecture and pre-training, then by method: dense ones first, then by title. A run found twice
    counts once.
    """
    groups: dict[tuple, dict[tuple, dict[tuple, tuple[Path, Record]]]] = {}
    folds: dict[tuple, tuple[Path, Record]] = {}
    for path, record in found:
        key = record["dataset"]["title"], record["preset"], record["model"]["architecture"], pretraining(record)
        methods = groups.setdefault(key, {})
        runs = methods.setdefault((record["sparse"], record["title"], record["method"]), {})
        twin = runs.setdefault(replicate(record), (path, record))
        if twin[1] != record:
            raise UserError(f"{path}: seed {record['seed']} of '{record['method']}' is also in {twin[0]} with other content; remove one.")
        comparable = "runs of one dataset and preset can be compared only if they agree"
        _check_same(next(iter(next(iter(methods.values())).values())), (path, record), SAME_IN_GROUP, comparable)
        _check_same(folds.setdefault((*key, record.get("fold")), (path, record)), (path, record), SAME_IN_FOLD, comparable)
        averaged = "seeds of one method can be averaged only if they agree"
        _check_same(next(iter(runs.values())), (path, record), SAME_IN_METHOD, averaged)
        of_fold = next(run for (_, fold), run in runs.items() if fold == replicate(record)[1])
        _check_same(of_fold, (path, record), SAME_IN_METHOD_AND_FOLD, averaged)
    return [_make_group(groups[key]) for key in sorted(groups)]


def _make_group(methods: dict[tuple, dict[tuple, tuple[Path, Record]]]) -> Group:
    made = [Method(key[2], key[1], key[0], [runs[one][1] for one in sorted(runs)]) for key, runs in sorted(methods.items())]
    first = made[0].records[0]
    return Group(first["dataset"], first["preset"], first["metric"], made)


def entry_at(record: Record, share: str) -> dict | None:
    """The quality entry at k = E/2 or k = E (`share`); a dense model has a single one, which stands at E."""
    if not record["sparse"] and share != "E":
        return None
    experts = record["model"]["num_experts"] if record["sparse"] else None
    wanted = experts if share == "E" else experts // 2
    return next((entry for entry in record["quality"] if entry["k"] == wanted), None)


def quality_points(method: Method) -> list[tuple[int | None, float, float, float]]:
    """(k, activated parameters, mean quality, standard deviation over seeds or 0), ascending k; a dense model has one, with k None."""
    by_k: dict[int | None, list[dict]] = {}
    for record in method.records:
        for entry in record["quality"]:
            by_k.setdefault(entry["k"], []).append(entry)
    points = []
    for k in sorted(by_k, key=lambda k: -1 if k is None else k):
        values = [entry[split_of(method.records[0])] for entry in by_k[k]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((k, statistics.mean(entry["active_parameters"] for entry in by_k[k]), statistics.mean(values), spread))
    return points
