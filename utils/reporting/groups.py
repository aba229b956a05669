"""Records put together: the rows of a table, each the replicates of one run, and the groups of rows that may be compared."""

import json
import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.reporting.labels import Record, architecture_label, method_label, preset_label, training_label
from utils.reporting.records import data_stem, get, replicate, split_of

Found = Iterable[tuple[Path, Record]]
# Replicates are only averaged, and rows of one table only compared, where these agree.
SAME_IN_ROW = ("training.steps", "model.num_experts")
SAME_IN_GROUP = ("metric.name", "metric.lower_is_better")
SAME_IN_FOLD = ("dataset.fingerprint",)
SAME_IN_ROW_AND_FOLD = ("parameters.total",)  # a head may depend on what occurs in training


@dataclass
class Row:
    """The replicates of one run: one a seed, of a task with folds one a seed and fold. number: where its group compares rows along one."""

    label: str
    records: list[Record]
    number: float | None = None

    @property
    def method(self) -> str:
        return self.records[0]["method"]

    @property
    def sparse(self) -> bool:
        return self.records[0]["sparse"]

    @property
    def experts(self) -> int | None:
        return self.records[0]["model"]["num_experts"]

    @property
    def name(self) -> str:
        """The label and the number of replicates."""
        return f"{self.label} (n = {len(self.records)})"


@dataclass
class Group:
    """The rows of one table and its figures. title: what all have in common. stem: the beginning of file names. start: the training that
    all went on from. others: records that the rows are held against.
    """

    title: str
    stem: str
    rows: list[Row]
    start: str = ""
    others: list[Record] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return [record for row in self.rows for record in row.records]

    @property
    def first(self) -> Record:
        return self.rows[0].records[0]

    @property
    def metric(self) -> dict[str, Any]:
        return self.first["metric"]

    @property
    def split(self) -> str:
        return split_of(self.first)

    @property
    def shown(self) -> str:
        """The quality that is shown."""
        return f"{self.split} {self.metric['name']}"


def frozen(value: Any) -> str:
    """Values as a key."""
    return json.dumps(value, sort_keys=True)


def gather(
    found: Found, group_of: Callable[[Record], Hashable], row_of: Callable[[Record], Hashable], same_in_row: Iterable[str] = SAME_IN_ROW
) -> dict[Any, dict[Any, list[Record]]]:
    """Replicates by group and row, in the order of their keys. A run found twice counts once. UserError for records that cannot be averaged
    or compared.
    """
    groups: dict[Hashable, dict[Hashable, dict[tuple[int, int], tuple[Path, Record]]]] = {}
    folds: dict[tuple, tuple[Path, Record]] = {}
    for path, record in found:
        key = group_of(record)
        rows = groups.setdefault(key, {})
        runs = rows.setdefault(row_of(record), {})
        twin = runs.setdefault(replicate(record), (path, record))
        if twin[1] != record:
            of = f"seed {record['seed']} of '{method_label(record)}'"
            raise UserError(f"{path}: {of} is also in {twin[0]} with other content; remove one")
        comparable = "runs of one dataset and preset can be compared only if they agree"
        _check_same(next(iter(next(iter(rows.values())).values())), (path, record), SAME_IN_GROUP, comparable)
        _check_same(folds.setdefault((key, record.get("fold")), (path, record)), (path, record), SAME_IN_FOLD, comparable)
        averaged = "replicates can be averaged only if they agree"
        _check_same(next(iter(runs.values())), (path, record), same_in_row, averaged)
        of_fold = next(run for (_, fold), run in runs.items() if fold == replicate(record)[1])
        _check_same(of_fold, (path, record), SAME_IN_ROW_AND_FOLD, averaged)
    return {
        key: {row: [runs[one][1] for one in sorted(runs)] for row, runs in sorted(rows.items())} for key, rows in sorted(groups.items())
    }


def _check_same(one: tuple[Path, Record], other: tuple[Path, Record], names: Iterable[str], purpose: str) -> None:
    for name in names:
        a, b = get(one[1], name), get(other[1], name)
        if a != b:
            raise UserError(f"{other[0]}: '{name}' is {b!r}, but {a!r} in {one[0]}; {purpose}")


def method_groups(found: Found) -> list[Group]:
    """Tables 1 and 2: by dataset, preset, architecture and pre-training; dense rows first, then by label."""

    def group_of(record: Record) -> tuple[str, ...]:
        start = record.get("pretrained", {})
        names = ("dataset", "preset", "preset_settings", "steps", "checkpoint", "operations")
        trained = {name: start[name] for name in names if name in start}
        trained["dataset"] = trained.get("dataset", {}).get("title", start.get("folder"))
        architecture = record["model"]["architecture"]
        return record["dataset"]["title"], record["preset"], frozen(record["preset_settings"]), architecture, frozen(trained)

    def row_of(record: Record) -> tuple:
        before = record.get("pretrained", {}).get("settings")
        return record["sparse"], method_label(record).lower(), record["method"], frozen([record["settings"], before])

    groups = []
    for rows in gather(found, group_of, row_of).values():
        made = [Row(method_label(records[0]), records) for records in rows.values()]
        groups.append(titled(made))
    return with_own_stems(groups)


def titled(rows: list[Row], preset_settings: dict[str, Any] | None = None) -> Group:
    """A group that is called after its data, preset and pre-training. preset_settings: those that its rows share; default the first's."""
    first = rows[0].records[0]
    settings = first["preset_settings"] if preset_settings is None else preset_settings
    model = "".join(f"{name} on " for name in architecture_label(first))
    title = f"{model}{first['dataset']['title']}, preset {preset_label(first['preset'], settings)}"
    start = training_label(first["pretrained"]) if "pretrained" in first else ""
    return Group(title, data_stem(first | {"preset_settings": settings}, short=True), rows, start)


def with_own_stems(groups: list[Group]) -> list[Group]:
    """File names must differ where titles do."""
    taken: dict[str, int] = {}
    for group in groups:
        taken[group.stem] = taken.get(group.stem, 0) + 1
        if taken[group.stem] > 1:
            group.stem = f"{group.stem}-{taken[group.stem]}"
    return groups


def entry_at(record: Record, share: str) -> dict | None:
    """The quality entry at k = E/2 or k = E (`share`); a dense model has a single one, which stands at E."""
    if not record["sparse"] and share != "E":
        return None
    experts = record["model"]["num_experts"] if record["sparse"] else None
    wanted = experts if share == "E" else experts // 2
    return next((entry for entry in record["quality"] if entry["k"] == wanted), None)


def quality_points(row: Row) -> list[tuple[int | None, float, float, float]]:
    """(k, activated parameters, mean quality, standard deviation or 0), ascending k; a dense model has one, with k None."""
    by_k: dict[int | None, list[dict]] = {}
    for record in row.records:
        for entry in record["quality"]:
            by_k.setdefault(entry["k"], []).append(entry)
    points = []
    for k in sorted(by_k, key=lambda k: -1 if k is None else k):
        mean, spread = mean_and_spread([entry[split_of(row.records[0])] for entry in by_k[k]])
        points.append((k, statistics.mean(entry["active_parameters"] for entry in by_k[k]), mean, spread))
    return points


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
