"""Ablations: runs that differ from SMoE-Dropout's in one setting, as script/ablation/rows.json lists them.

A run belongs to a row if it has the identity that the row's flags have under its preset. Rows of Table 1 are taken from there.

    python -m utils.reporting.ablations NAME          # the names of its rows
    python -m utils.reporting.ablations NAME ROW      # the flags of a row, one word a line
"""

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from smoe_dropout.registry import unknown
from utils.errors import UserError, run_main
from utils.flags.derive import resolve, training_flags, usual_flags
from utils.flags.fields import Flags
from utils.formatting import short_number
from utils.reporting.groups import Found, Group, Row, frozen, gather, quality_points, titled
from utils.reporting.labels import Record, slug
from utils.reporting.records import ROOT, file_name
from utils.reporting.tables import Cell, Table, caption, mark_best, published_column, quality_cell
from utils.training.identity import departures

ROWS = ROOT / "script" / "ablation" / "rows.json"


@dataclass(frozen=True)
class AblationRow:
    """One entry of rows.json. run: the name of its runs."""

    name: str
    label: str
    flags: dict[str, Any]
    run: str

    def identity(self, model: str, preset: str) -> tuple[str, dict[str, Any], dict[str, Any], Flags]:
        """Method, settings and preset settings that a record of it has, and its flags, decided."""
        usual = training_flags(model, self.flags["method"], preset)
        flags = resolve(Flags(**{**usual, **self.flags, "model": model, "preset": preset}))
        preset_settings, settings = departures(flags, usual_flags(flags))
        return self.flags["method"], settings, preset_settings, flags

    @property
    def words(self) -> list[str]:
        """Its flags as words of a command line."""
        words = []
        for name, value in {**self.flags, "run_name": self.run}.items():
            words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        return words


@dataclass(frozen=True)
class Ablation:
    """A table of rows. axis: the title of the number in which rows differ, if it is one; along: its flag. by_share: k is compared as a
    share of E.
    """

    name: str
    title: str
    rows: tuple[AblationRow, ...]
    axis: str = ""
    along: str = ""
    by_share: bool = False

    def find(self, record: Record) -> tuple[int, float | None, dict[str, Any]] | None:
        """The row of a run, its number along the axis, and the further preset settings that the run has; None for a run of no row."""
        identities = _identities(self.name, record["model"]["architecture"], record["preset"])
        varied = {name for _, _, preset_settings, _ in identities for name in preset_settings}
        own = {name: value for name, value in record["preset_settings"].items() if name in varied}
        for index, (method, settings, preset_settings, flags) in enumerate(identities):
            if (record["method"], record["settings"], own) == (method, settings, preset_settings) and "pretrained" not in record:
                rest = {name: value for name, value in record["preset_settings"].items() if name not in varied}
                return index, getattr(flags, self.along) if self.along else None, rest
        return None


def _read(path: Path) -> dict[str, Ablation]:
    found = {}
    for name, one in json.loads(path.read_text(encoding="utf-8")).items():
        rows = tuple(AblationRow(**{"run": row["name"], **row}) for row in one.pop("rows"))
        found[name] = Ablation(name, rows=rows, **one)
    return found


ABLATIONS = _read(ROWS)


@cache
def _identities(name: str, model: str, preset: str) -> list[tuple[str, dict[str, Any], dict[str, Any], Flags]]:
    return [row.identity(model, preset) for row in ABLATIONS[name].rows]


def place(record: Record) -> Path:
    """The path of a record in results/ablation, by the first row that it belongs to. UserError for a run of no row."""
    for ablation in ABLATIONS.values():
        if found := ablation.find(record):
            index, _, rest = found
            return Path(slug(f"{ablation.name}-{ablation.rows[index].name}")) / file_name(record | {"preset_settings": rest})
    raise UserError(f"a run of {record['method']} with {record['settings']} is no row of {ROWS.relative_to(ROOT)}")


def groups_of(ablation: Ablation, found: Found) -> list[Group]:
    """The rows there are runs of, in the ablation's order; a group for each text, preset and architecture in which two rows differ."""
    rows = {id(record): row for _, record in found if (row := ablation.find(record))}

    def group_of(record: Record) -> tuple[str, ...]:
        further = frozen(rows[id(record)][2])
        return record["dataset"]["title"], record["preset"], further, record["model"]["architecture"]

    groups = []
    known = [(path, record) for path, record in found if id(record) in rows]
    for by_row in gather(known, group_of, lambda record: rows[id(record)][0]).values():
        made = [Row(ablation.rows[index].label, records, rows[id(records[0])][1]) for index, records in by_row.items()]
        if len({row.number if ablation.axis else row.label for row in made}) > 1:
            group = titled(made, rows[id(made[0].records[0])][2])
            group.stem += f"-{ablation.name.replace('_', '-')}"
            groups.append(group)
    return groups


def build_table(ablation: Ablation, group: Group) -> Table:
    """Quality at E/2, at E and at the best k, and the published numbers where there are any."""
    lower = group.metric["lower_is_better"]
    header = [ablation.title, f"{group.shown.capitalize()}, k = E/2", "k = E", "best k (mean)", "Parameters"]
    table = Table(f"ablation:{group.stem}", f"{ablation.title}. {caption(group)}", header, [])
    for row in group.rows:
        cells = [Cell(row.name), quality_cell(row, "E/2"), quality_cell(row, "E"), Cell(_best(row, lower))]
        table.rows.append([*cells, Cell(short_number(row.records[0]["parameters"]["total"]))])
    for column in (1, 2):
        mark_best(table.rows, column, lower)
    for label, entry in published_column(table, group, ablation.name):
        note = f"; {entry['note']}" if "note" in entry else ""
        table.footnotes.append(f"Published, {label}: {entry['source']}{note}.")
    return table


def _best(row: Row, lower: bool) -> str:
    k, _, mean, _ = (min if lower else max)(quality_points(row), key=lambda point: point[2])
    return f"{mean:.3f}" + (f" (k = {k})" if k else "")


def main(argv: list[str] | None = None) -> None:
    """Prints the rows of an ablation, or the flags of one row."""
    name, *rest = sys.argv[1:] if argv is None else argv
    if name not in ABLATIONS:
        raise UserError(unknown("ablation", name, list(ABLATIONS)))
    rows = {row.name: row for row in ABLATIONS[name].rows}
    if rest and rest[0] not in rows:
        raise UserError(unknown(f"row of {name}", rest[0], list(rows)))
    print("\n".join(rows[rest[0]].words if rest else rows))


if __name__ == "__main__":
    run_main(main)
