"""Tables, figures and pages from the records of finished runs.

python -m utils.reporting                                              # every page of results/ and its figures
python -m utils.reporting table1 --runs runs/laptop --figs Figs        # the runs in a folder
python -m utils.reporting ablation --only schedule                     # committed records, one ablation
python -m utils.reporting --collect runs/a runs/b                      # copy finished runs into results/
"""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils import documents
from utils.errors import Parser, UserError, run_main
from utils.reporting import ablations, records
from utils.reporting.labels import Record
from utils.reporting.pages import update_page, writing
from utils.reporting.published import elsewhere
from utils.reporting.surgery_table import surgery_tables
from utils.reporting.tables import Table, footnotes, method_tables, to_latex, to_markdown

RESULTS, FIGURES = Path("results"), Path("Figs")


class Kind(NamedTuple):
    """A table of results/: its folders of records, the tables that its records may name, how it is built from records and the names of
    ablations, the remedy where there are none, and the path of a record in its folder.
    """

    sources: tuple[str, ...]
    accepts: tuple[str, ...]
    build: Callable[[records.Found, list[str] | None], list[Table]]
    missing: str
    place: Callable[[Record], Path] = records.place


NO_ROWS = "no two finished rows to compare: run script/ablation/run_all.sh NAME"
TABLES = {
    "table1": Kind(("table1",), ("table1",), partial(method_tables, "table1"), "finish a run of train.py first"),
    "table2": Kind(("table2",), ("table2",), partial(method_tables, "table2"), "finish a run of finetune.py first"),
    "surgery": Kind(("surgery",), ("table1", "table2", "surgery"), surgery_tables, "finish a run that starts from surgery first"),
    "ablation": Kind(("table1", "ablation"), ("table1",), ablations.ablation_tables, NO_ROWS, ablations.place),
    "replica": Kind(
        ("replica",), ("table1",), partial(ablations.ablation_tables, page="replica"), NO_ROWS, partial(ablations.place, page="replica")
    ),
}


def place(record: Record, table: str) -> Path:
    """The path of a record in results/. UserError for one of another table."""
    if table not in TABLES or record["table"] not in TABLES[table].accepts:
        raise UserError(f"a record of '{record['table']}' cannot be collected into '{table}'; say which table: {', '.join(TABLES)}")
    return Path(table) / TABLES[table].place(record)


def render(name: str, tables: Iterable[Table], folder: str | None) -> str:
    """Tables as Markdown, each with its figures if `folder` says where these are, and the footnotes of all."""
    texts = []
    for table in tables:
        texts += [to_markdown(table), *(f"![{one.caption}]({folder}/{name}/{one.name})" for one in table.figures if folder)]
    return "\n\n".join(filter(None, [*texts, footnotes(tables)]))


def draw(name: str, tables: Iterable[Table], folder: Path) -> None:
    """Draws the figures of a table into a folder of its name."""
    from utils.reporting import figures  # here, because it imports matplotlib, which tables do without

    for figure in (figure for table in tables for figure in table.figures):
        with writing(folder / name / figure.name) as file:
            getattr(figures, figure.function)(*figure.arguments, file)
        print(f"drawn {folder / name / figure.name}", file=sys.stderr)


def build_tables(name: str, results: list[Path], runs: list[Path] = (), only: list[str] | None = None) -> list[Table]:
    """UserError where there is nothing to show."""
    tables = TABLES[name].build(records.load_records(results, runs), only)
    if not tables:
        where = ", ".join(map(str, [*results, *runs]))
        raise UserError(f"{where}: no complete record for '{name}'; {TABLES[name].missing}, or name folders with --runs")
    return tables


def render_pages() -> None:
    """Every page of results/ and its figures."""
    for name, kind in TABLES.items():
        tables = [*build_tables(name, [RESULTS / source for source in kind.sources]), *elsewhere(name)]
        draw(name, tables, FIGURES)
        update_page(RESULTS / name / "page.md", name, render(name, tables, "../../Figs"))
        print(f"rendered {RESULTS / name / 'page.md'}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    description = "Renders tables, figures and pages from the records of finished runs. Without arguments: every page of results/."
    parser = Parser(prog="python -m utils.reporting", description=description)
    paths = {"type": Path, "nargs": "+", "metavar": "PATH", "default": []}
    parser.add_argument("table", nargs="?", choices=TABLES, help="what to render")
    parser.add_argument("--runs", **paths, help="folders of runs, searched for result.json")
    parser.add_argument("--results", **paths, help="folders or files of records; default those of results/ unless --runs is given")
    parser.add_argument("--only", nargs="+", choices=list(ablations.all_ablations()), help="these ablations; default all")
    parser.add_argument("--collect", **paths, help="finished runs to copy into results/TABLE; default the table they name")
    parser.add_argument("--force", action="store_true", help="let --collect replace a record that differs")
    parser.add_argument("--page", type=Path, help="Markdown file with <!-- TABLE:begin --> and <!-- TABLE:end -->, to render between them")
    parser.add_argument("--latex", type=Path, help="LaTeX file to write (booktabs)")
    parser.add_argument("--figs", type=Path, help="folder to draw figures into, below it one for each table")
    args = parser.parse_args(argv)
    if args.table is None and (args.runs or args.results or args.only or args.page or args.latex or args.figs):
        parser.error(f"say which table: {', '.join(TABLES)}")
    if args.collect:
        for target in records.collect(args.collect, lambda record: RESULTS / place(record, args.table or record["table"]), args.force):
            print(f"collected {target}", file=sys.stderr)
        return
    if args.table is None:
        render_pages()
        return
    sources = [RESULTS / source for source in TABLES[args.table].sources if (RESULTS / source).exists()]
    results = args.results or ([] if args.runs else sources or [RESULTS / args.table])
    tables = build_tables(args.table, results, args.runs, args.only)
    if args.page:
        update_page(args.page, args.table, render(args.table, tables, os.path.relpath(args.figs or FIGURES, args.page.parent)))
    if args.latex:
        with writing(args.latex) as file:
            documents.replace(file, "\n".join(map(to_latex, tables)).encode())
    if args.figs:
        draw(args.table, tables, args.figs)
    print(render(args.table, tables, None))


if __name__ == "__main__":
    run_main(main)
