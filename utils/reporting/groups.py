"""Groups of records: the rows of a table, each the replicates of one run, and the rows that may be compared."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from utils.errors import UserError
from utils.reporting.labels import Record, architecture_label, method_label, phrases, preset_label, training_label
from utils.reporting.records import Found, data_stem, get, replicate, split_of

# Replicates are averaged, and rows of one table compared, only where these agree.
SAME_IN_ROW = ("training.steps", "model.num_experts")
SAME_IN_GROUP = ("metric.name", "metric.lower_is_better")
ROW_SETTINGS = {"dropout"}  # preset settings in which the rows of Tables 1 and 2 may differ, as they do by method


@dataclass
class Row:
    """The replicates of one run: one per seed and fold. number: the row's place along the axis of an ablation."""

    label: str
    records: list[Record]
    number: float | None = None

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def sparse(self) -> bool:
        return self.first["sparse"]

    @property
    def experts(self) -> int:
        """E; 0 for a dense model."""
        return self.first["model"]["num_experts"] or 0


@dataclass
class Group:
    """The rows of one table and its figures. title: what all rows share. stem: the beginning of file names. start: the training that all
    continue. others: records that the rows are compared with.
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
        return self.rows[0].first

    @property
    def metric(self) -> dict[str, Any]:
        return self.first["metric"]

    @property
    def shown(self) -> str:
        """The quality that is shown."""
        return f"{split_of(self.first)} {self.metric['name']}"


def frozen(value: Any) -> str:
    """Values as a key."""
    return json.dumps(value, sort_keys=True)


def gather(
    found: Found,
    group_of: Callable[[Record], Hashable],
    row_of: Callable[[Record], Hashable],
    label_of: Callable[[Record], str] = method_label,
    same_in_row: Iterable[str] = SAME_IN_ROW,
) -> list[list[Row]]:
    """Rows by group, both in the order of their keys. A run found twice counts once. UserError for records that cannot be averaged or
    compared.
    """
    groups: dict[Hashable, dict[Hashable, dict[tuple[int, int], Record]]] = {}
    seen: dict[tuple, Any] = {}  # the first record of each group, row and fold
    for path, record in found:
        key, row, (_, fold) = group_of(record), row_of(record), replicate(record)
        runs = groups.setdefault(key, {}).setdefault(row, {})
        if runs.setdefault(replicate(record), record) != record:
            run = f"seed {record['seed']} of '{method_label(record)}'"
            raise UserError(f"{path}: {run} is also in {seen[key, row, replicate(record)][0]} with other content; remove one")
        seen.setdefault((key, row, replicate(record)), (path, record))
        compared, averaged = ("runs of one dataset and preset can be compared", "replicates can be averaged")
        for scope, names, purpose in (
            ((key,), SAME_IN_GROUP, compared),
            ((key, "fold", fold), ("dataset.fingerprint",), compared),
            ((key, "row", row), same_in_row, averaged),
            ((key, row, "fold", fold), ("parameters.total",), averaged),  # a head may depend on the training data, which folds do not share
        ):
            other, one = seen.setdefault(scope, (path, record))
            for name in names:
                if get(record, name) != get(one, name):
                    raise UserError(
                        f"{path}: '{name}' is {get(record, name)!r}, but {get(one, name)!r} in {other}; {purpose} only if they agree"
                    )
    ordered = [[[runs[one] for one in sorted(runs)] for _, runs in sorted(rows.items())] for _, rows in sorted(groups.items())]
    return [[Row(label_of(records[0]), records) for records in rows] for rows in ordered]


def method_groups(found: Found) -> list[Group]:
    """Tables 1 and 2: by dataset, preset, architecture and pre-training; dense rows first, then by label."""

    def group_of(record: Record) -> tuple[str, ...]:
        start = record.get("pretrained", {})
        trained = {name: start.get(name) for name in ("preset", "preset_settings", "steps", "checkpoint", "operations")}
        trained["dataset"] = start.get("dataset", {}).get("title", start.get("folder"))
        architecture = record["model"]["architecture"]
        return record["dataset"]["title"], record["preset"], frozen(settings_of(record, rows=False)), architecture, frozen(trained)

    def row_of(record: Record) -> tuple:
        before = record.get("pretrained", {}).get("settings")
        own = settings_of(record, rows=True)
        return record["sparse"], method_label(record).lower(), record["method"], frozen([record["settings"], before]), len(own), frozen(own)

    def label_of(record: Record) -> str:
        return ", ".join([method_label(record), *phrases(settings_of(record, rows=True))])

    groups = gather(found, group_of, row_of, label_of)
    return with_own_stems(titled(rows, settings_of(rows[0].first, rows=False)) for rows in groups)


def settings_of(record: Record, rows: bool) -> dict[str, Any]:
    """The preset settings of a run that are its row's own, or those that all rows of its group share."""
    return {name: value for name, value in record["preset_settings"].items() if (name in ROW_SETTINGS) == rows}


def titled(rows: list[Row], preset_settings: dict[str, Any] | None = None) -> Group:
    """A group named after its data, preset and pre-training. preset_settings: those that its rows share; default the first's."""
    first = rows[0].first
    settings = first["preset_settings"] if preset_settings is None else preset_settings
    model = "".join(f"{name} on " for name in architecture_label(first))
    title = f"{model}{first['dataset']['title']}, preset {preset_label(first['preset'], settings)}"
    start = training_label(first["pretrained"]) if "pretrained" in first else ""
    return Group(title, data_stem(first | {"preset_settings": settings}, short=True), rows, start)


def with_own_stems(groups: Iterable[Group]) -> list[Group]:
    """Numbers the stems that several groups share: file names must differ where titles do."""
    groups, taken = list(groups), Counter()
    for group in groups:
        taken[group.stem] += 1
        group.stem += f"-{taken[group.stem]}" * (taken[group.stem] > 1)
    return groups


def quality_points(row: Row) -> list[tuple[int | None, float, float, float]]:
    """(k, activated parameters, mean quality, standard deviation or 0), ascending k; a dense model has one, with k None."""
    by_k: dict[int | None, list[dict]] = {}
    for entry in (entry for record in row.records for entry in record["quality"]):
        by_k.setdefault(entry["k"], []).append(entry)
    return [
        (
            k,
            statistics.mean(entry["active_parameters"] for entry in by_k[k]),
            *mean_and_spread(entry[split_of(row.first)] for entry in by_k[k]),
        )
        for k in sorted(by_k, key=lambda k: k or 0)
    ]


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
