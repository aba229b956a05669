"""Ablations: tables and figures of runs that differ from SMoE-Dropout's in one setting.

    python -m utils.reporting.ablations --readme README.md --figs Figs             # from results/table1 and results/ablation
    python -m utils.reporting.ablations --collect runs/a runs/b                    # take finished runs into results/ablation
    python -m utils.reporting.ablations --only schedule --runs runs/laptop/enwik8  # from the runs of script/ablation/run_all.sh schedule

A run belongs to a row by what its record says of where it departs from method and preset. Rows of Table 1 are taken from there.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, run_main
from utils.formatting import short_number
from utils.reporting.records import PUBLISHED, ROOT, Group, Record, find_records, group_records, load_records, quality_points, split_of
from utils.reporting.tables import DASH, Cell, Table, caption, collect, mark_best, quality_cell, to_markdown, update_readme

RESULTS = (Path("results/table1"), Path("results/ablation"))


class Row(NamedTuple):
    """label: in the table. method, departs: the method's name in records, and what stands behind it. published: its name among published
    numbers. number: of an ablation along a number.
    """

    label: str
    method: str
    departs: str = ""
    published: str | None = None
    number: int | None = None


@dataclass(frozen=True)
class Ablation:
    """A folder of script/ablation, or script/figure5. axis: what the rows' numbers count. size: what they are in the record's model, where
    rows differ in that and not in the method. by_share: k is to be compared as a share of E.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    axis: str = ""
    size: str = ""
    by_share: bool = False


def _read(path: Path) -> tuple[Ablation, ...]:
    return tuple(
        Ablation(**{**one, "rows": tuple(Row(**row) for row in one["rows"])}) for one in json.loads(path.read_text(encoding="utf-8"))
    )


ABLATIONS = _read(ROOT / "script" / "ablation" / "rows.json")


def _words(text: str) -> tuple[str, list[str]]:
    """ "name (a=b, c=d)" -> "name", ["a=b", "c=d"]"""
    name, _, rest = text.partition(" ")
    return name, rest[1:-1].split(", ") if rest else []


def row_of(record: Record, ablation: Ablation) -> Row | None:
    """The row that a run belongs to."""
    method, departs = _words(record["method"])
    rows = (row for row in ablation.rows if row.method == method and set(_words(f"{row.method} {row.departs}")[1]) == set(departs))
    return next((row for row in rows if not ablation.size or record["model"][ablation.size] == row.number), None)


def _preset(record: Record, ablation: Ablation) -> str:
    """The record's without the size in which rows differ: runs with further flags make a table of their own."""
    name, words = _words(record["preset"])
    kept = [word for word in words if not ablation.size or not word.startswith(f"{ablation.size}=")]
    return f"{name} ({', '.join(kept)})" if kept else name


def groups_of(ablation: Ablation, found: Iterable[tuple[Path, Record]]) -> list[Group]:
    """The rows there are runs of, in the ablation's order; a group for each text, preset and architecture where they differ."""
    order = {row.label: i for i, row in enumerate(ablation.rows)}
    named = []
    for path, record in found:
        if row := row_of(record, ablation):
            named.append((path, {**record, "preset": _preset(record, ablation), "title": row.label, "method": row.label}))
    groups = [replace(group, methods=sorted(group.methods, key=lambda m: order[m.name])) for group in group_records(named)]
    numbers = {row.label: row.number for row in ablation.rows}
    return [group for group in groups if len({numbers[m.name] or m.name for m in group.methods}) > 1]


def build_table(ablation: Ablation, group: Group, published: list[dict]) -> Table:
    """Quality at E/2, at E and at the best k; the published column where there are numbers of it."""
    known = {entry["variant"]: entry["values"] for entry in published if entry["table"] == ablation.name}
    shown, lower = f"{split_of(group.methods[0].records[0])} {group.metric['name']}", group.metric["lower_is_better"]
    header = [ablation.title, f"{shown}, k = E/2", "k = E", "best k (mean)", "Parameters"]
    rows = []
    for method in group.methods:
        cells = [Cell(f"{method.title} (n = {len(method.records)})"), quality_cell(method, "E/2"), quality_cell(method, "E")]
        rows.append([*cells, Cell(_best(method, lower)), Cell(short_number(method.records[0]["parameters"]["total"]))])
    for column in (1, 2):
        mark_best(rows, column, lower)
    if known and group.dataset["name"].startswith("enwik8"):
        header.append("Published (all of enwik8), E/2 / E")
        names = {row.label: row.published for row in ablation.rows}
        for method, cells in zip(group.methods, rows, strict=True):
            values = known.get(names[method.name], {})
            cells.append(Cell(f"{values['E/2']} / {values['E']}" if values else DASH))
    return Table(f"ablation:{ablation.name}:{group.stem('-')}", f"{ablation.title}. {caption(group)}", header, rows)


def _best(method, lower: bool) -> str:
    k, _, mean, _ = (min if lower else max)(quality_points(method), key=lambda point: point[2])
    return f"{mean:.3f}" + (f" (k = {k})" if k else "")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m utils.reporting.ablations", description="Tables and figures of ablations from records."
    )
    parser.add_argument("--only", choices=[one.name for one in ABLATIONS], nargs="+", help="these ablations (default: all)")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="PATH", help="folders of runs, instead of the committed records")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="PATH", help="finished runs to copy into results/ablation")
    parser.add_argument("--readme", type=Path, help="README to put the tables into")
    parser.add_argument("--figs", type=Path, help="folder to draw the figures into")
    return parser.parse_args(argv)


def render(found: list[tuple[Path, Record]], published: list[dict], only: list[str] | None = None, figs: Path | None = None) -> str:
    """The tables as Markdown, each with its figure, drawn if `figs` is given."""
    parts = []
    for ablation in (one for one in ABLATIONS if only is None or one.name in only):
        for group in groups_of(ablation, found):
            parts.append(to_markdown(build_table(ablation, group, published)).strip())
            name = f"ablation_{ablation.name}_{group.stem('_')}.png"
            parts.append(f"![{ablation.title}: quality by k](Figs/{name})")
            if figs:
                from utils.reporting.ablation_figure import draw  # here, because it imports matplotlib, which tables do without

                draw(ablation, group, figs / name)
                print(f"drawn {figs / name}", file=sys.stderr)
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    args = _parse(argv)
    for target in collect(args.collect or [], "table1", RESULTS[1]):
        print(f"collected {target}", file=sys.stderr)
    sources = [path for path in RESULTS if path.exists()] if args.runs is None else []
    found = load_records(find_records(sources, args.runs or []), "table1")
    text = render(found, json.loads(PUBLISHED.read_text(encoding="utf-8"))["entries"], args.only, args.figs)
    if not text:
        raise UserError("there are no two finished rows of an ablation to compare: run script/ablation/run_all.sh NAME first")
    print(text)
    if args.readme:
        update_readme(args.readme, "ablation", text)


if __name__ == "__main__":
    run_main(main)
