"""Tables, figures and pages from the records of finished runs.

python -m utils.reporting                                              # every page of results/ and its figures
python -m utils.reporting table1 --runs runs/laptop --figs Figs        # the runs in a folder
python -m utils.reporting ablation --only schedule                     # committed records, one ablation
python -m utils.reporting --collect runs/a runs/b                      # take finished runs into results/
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, run_main
from utils.reporting import ablations, records, surgery_table, tables
from utils.reporting.groups import Found, Group, method_groups
from utils.reporting.labels import Record
from utils.reporting.pages import update_page
from utils.reporting.records import collect, find_records, load_records
from utils.reporting.tables import Table, footnotes, to_latex, to_markdown

RESULTS, FIGURES = Path("results"), Path("Figs")
FIXED_ROUTER = "random"  # its methods, which differ in how k is trained, get figures of their own


class Figure(NamedTuple):
    """A file name, the title on a page, and the function of utils.reporting.figures with its arguments before the path."""

    name: str
    title: str
    draw: tuple


class Part(NamedTuple):
    """The table and the figures of one group."""

    table: Table
    figures: list[Figure]


def of_methods(table: str, found: Found, _only: list[str] | None = None) -> list[Part]:
    """Tables 1 and 2."""
    mine = [(path, record) for path, record in found if record["table"] == table]
    return [Part(tables.build_table(group, table), _figures_of_methods(group)) for group in method_groups(mine)]


def _figures_of_methods(group: Group) -> list[Figure]:
    about = group.title
    if group.start:
        figures = [Figure(f"{group.stem}-by-k.png", f"{about}: quality against k", ("draw_by_k", group))]
    else:
        figures = [Figure(f"{group.stem}-slimmable.png", f"{about}: quality against activated parameters", ("draw_slimmable", group))]
    curves = [Figure(f"{group.stem}-curves.png", f"{about}: training and validation curves, and k", ("draw_curves", group))]
    figures += curves if _has_curves(group) else []
    router = [row for row in group.rows if not row.sparse or row.records[0]["model"].get("router") == FIXED_ROUTER]
    fixed = Group(group.title, group.stem, router, group.start)
    if not group.start and 1 < sum(row.sparse for row in fixed.rows) < sum(row.sparse for row in group.rows):
        named = f"{about}, frozen random router"
        figures.append(Figure(f"{group.stem}-frozen.png", f"{named}: quality against activated parameters", ("draw_slimmable", fixed)))
        figures += [Figure(f"{group.stem}-frozen-curves.png", f"{named}: curves, and k", ("draw_curves", fixed))] * _has_curves(fixed)
    return figures


def _has_curves(group: Group) -> bool:
    return any(record["curve"]["train"] or record["curve"]["valid"] for record in group.records)


def of_surgery(found: Found, _only: list[str] | None = None) -> list[Part]:
    """A table and a figure for each trained model, or each method where seeds are averaged."""
    return [
        Part(surgery_table.build_table(group), [Figure(f"{group.stem}.png", f"Surgery on {group.title}", ("draw_surgery", group))])
        for group in surgery_table.surgery_groups(found)
    ]


def of_ablations(found: Found, only: list[str] | None = None) -> list[Part]:
    """A table and a figure for each ablation with at least two finished rows."""
    parts = []
    for ablation in (one for name, one in ablations.ABLATIONS.items() if only is None or name in only):
        for group in ablations.groups_of(ablation, found):
            figure = Figure(f"{group.stem}.png", f"{ablation.title}: quality by k", ("draw_ablation", ablation, group))
            parts.append(Part(ablations.build_table(ablation, group), [figure]))
    return parts


class Kind(NamedTuple):
    """A table of results/. sources: its folders of records. accepts: the tables that its records may name. parts: made of records. place:
    of a record, in its own folder. missing: the remedy where there are none.
    """

    sources: tuple[str, ...]
    accepts: tuple[str, ...]
    parts: Callable[[Found, list[str] | None], list[Part]]
    place: Callable[[Record], Path]
    missing: str


TABLES = {
    "table1": Kind(("table1",), ("table1",), partial(of_methods, "table1"), records.place, "finish a run of train.py first"),
    "table2": Kind(("table2",), ("table2",), partial(of_methods, "table2"), records.place, "finish a run of finetune.py first"),
    "surgery": Kind(
        ("surgery",), ("table1", "table2", "surgery"), of_surgery, records.place, "finish a run that starts from surgery first"
    ),
    "ablation": Kind(
        ("table1", "ablation"),
        ("table1",),
        of_ablations,
        ablations.place,
        "no two finished rows to compare: run script/ablation/run_all.sh NAME",
    ),
}


def place(record: Record, table: str) -> Path:
    """The path of a record in results/. UserError for one of another table."""
    if table not in TABLES or record["table"] not in TABLES[table].accepts:
        raise UserError(f"a record of '{record['table']}' cannot be collected into '{table}'; say which table: {', '.join(TABLES)}")
    return Path(table) / TABLES[table].place(record)


def render(name: str, parts: Iterable[Part], folder: str | None) -> str:
    """Tables as Markdown, each with links to its figures if `folder` says where these are, and the footnotes of all."""
    texts = []
    for part in parts:
        texts.append(to_markdown(part.table))
        texts += [f"![{figure.title}]({folder}/{name}/{figure.name})" for figure in part.figures if folder]
    return "\n\n".join(filter(None, [*texts, footnotes(part.table for part in parts)]))


def draw(name: str, parts: Iterable[Part], folder: Path) -> None:
    """Draws the figures of a table into a folder of its name."""
    from utils.reporting import figures  # here, because it imports matplotlib, which tables do without

    for figure in (figure for part in parts for figure in part.figures):
        path, (function, *arguments) = folder / name / figure.name, figure.draw
        getattr(figures, function)(*arguments, path)
        print(f"drawn {path}", file=sys.stderr)


def parts_of(name: str, results: list[Path], runs: list[Path], only: list[str] | None = None) -> list[Part]:
    """UserError where there is nothing to show."""
    found = load_records(find_records(results, runs))
    parts = TABLES[name].parts(found, only)
    if not parts:
        where = ", ".join(map(str, [*results, *runs]))
        raise UserError(f"{where}: no complete record for '{name}'; {TABLES[name].missing}, or name folders with --runs")
    return parts


def render_pages() -> None:
    """Every page of results/, its figures, and the framework."""
    from utils.reporting.framework_figure import draw_framework  # here, because it imports matplotlib

    for name, kind in TABLES.items():
        parts = parts_of(name, [RESULTS / source for source in kind.sources], [])
        draw(name, parts, FIGURES)
        update_page(RESULTS / name / "page.md", name, render(name, parts, "../../Figs"))
        print(f"rendered {RESULTS / name / 'page.md'}", file=sys.stderr)
    draw_framework(FIGURES / "framework.png")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Renders tables, figures and pages from the records of finished runs. Without arguments: every page of results/."
    parser = argparse.ArgumentParser(prog="python -m utils.reporting", description=description)
    paths = {"type": Path, "nargs": "+", "metavar": "PATH", "default": []}
    parser.add_argument("table", nargs="?", choices=TABLES, help="what to render")
    parser.add_argument("--runs", **paths, help="folders of runs, searched for result.json")
    parser.add_argument("--results", **paths, help="folders or files of records; default those of results/ unless --runs is given")
    parser.add_argument("--only", nargs="+", choices=list(ablations.ABLATIONS), help="these ablations; default all")
    parser.add_argument("--collect", **paths, help="finished runs to copy into results/TABLE; default the table they name")
    parser.add_argument("--force", action="store_true", help="let --collect replace a record with other content")
    parser.add_argument("--page", type=Path, help="Markdown file with <!-- TABLE:begin --> and <!-- TABLE:end -->, to render between them")
    parser.add_argument("--latex", type=Path, help="LaTeX file to write (booktabs)")
    parser.add_argument("--figs", type=Path, help="folder to draw figures into, below it one for each table")
    args = parser.parse_args(argv)
    if args.table is None and (args.runs or args.results or args.only or args.page or args.latex or args.figs):
        parser.error(f"say which table: {', '.join(TABLES)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    args = _parse(argv)
    if args.collect:
        for target in collect(args.collect, lambda record: RESULTS / place(record, args.table or record["table"]), args.force):
            print(f"collected {target}", file=sys.stderr)
        return
    if args.table is None:
        render_pages()
        return
    sources = [RESULTS / source for source in TABLES[args.table].sources if (RESULTS / source).exists()]
    results = args.results or ([] if args.runs else sources or [RESULTS / args.table])
    parts = parts_of(args.table, results, args.runs, args.only)
    text = render(args.table, parts, None)
    print(text)
    if args.page:
        figures = args.figs or FIGURES
        update_page(args.page, args.table, render(args.table, parts, os.path.relpath(figures, args.page.parent)))
    if args.latex:
        args.latex.parent.mkdir(parents=True, exist_ok=True)
        args.latex.write_text("\n".join(to_latex(part.table) for part in parts), encoding="utf-8")
    if args.figs:
        draw(args.table, parts, args.figs)


if __name__ == "__main__":
    run_main(main)
