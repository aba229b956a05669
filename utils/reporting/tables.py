"""Tables and figures from the records of finished runs.

    python -m utils.reporting.tables --readme README.md --figs Figs          # from results/table1
    python -m utils.reporting.tables --collect runs/a runs/b --table table1  # take finished runs into results/table1

Runs are grouped by dataset and preset, then by method; numbers are means over seeds.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError, run_main
from utils.formatting import short_number
from utils.reporting.records import (
    PUBLISHED,
    Group,
    Method,
    Record,
    entry_at,
    find_records,
    group_records,
    load_records,
    named_architecture,
    pretraining,
    read_record,
    setting,
    slug,
    split_of,
)

DASH = "–"


@dataclass
class Cell:
    """One table cell; `value` is set where the best of a column is to be found."""

    text: str = DASH
    value: float | None = None
    bold: bool = False


@dataclass
class Table:
    """A table before it is written as Markdown or LaTeX."""

    label: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


def _values(method: Method, share: str, name: str) -> list[float]:
    entries = [entry_at(record, share) for record in method.records]
    return [entry[name] for entry in entries if entry is not None]


def quality_cell(method: Method, share: str) -> Cell:
    metric = method.records[0]["metric"]
    values, digits = _values(method, share, split_of(method.records[0])), 3 if metric["lower_is_better"] else 1  # a percentage
    if not values:
        return Cell()
    mean = statistics.mean(values)
    text = f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
    # The method's own n stands beside its title; here only where a seed lacks this k.
    text += f" (n = {len(values)})" if len(values) < len(method.records) else ""
    return Cell(text, value=round(mean, digits))


def _pair_cell(method: Method, name: str) -> Cell:
    values = [_values(method, share, name) for share in ("E/2", "E")]
    return Cell(" / ".join(short_number(statistics.mean(v)) if v else DASH for v in values) if any(values) else DASH)


def _routing_cell(found: list[dict]) -> Cell:
    """Means over seeds of what utils.training.routing measured."""
    if not found:
        return Cell()
    changed = [one["fluctuation"] for one in found if one["fluctuation"] is not None]
    share = f"{100 * statistics.mean(changed):.0f} %" if changed else DASH
    return Cell(f"{statistics.mean(one['load_entropy'] for one in found):.3f} / {share}")


def mark_best(rows: list[list[Cell]], column: int, lower_is_better: bool) -> None:
    cells = [row[column] for row in rows if row[column].value is not None]
    if len(cells) < 2:  # the best of one says nothing
        return
    best = (min if lower_is_better else max)(cell.value for cell in cells)
    for cell in cells:
        cell.bold = cell.value == best


def published_for(group: Group, method: Method, table: str, entries: list[dict]) -> dict | None:
    """The published entry of a method: same table, architecture and metric, and a dataset of the same family (enwik8-prefix: enwik8)."""
    name, metric = group.dataset["name"], group.metric["name"]
    for entry in entries:
        here = (table, method.name, method.records[0]["model"]["architecture"], metric)
        same = (entry["table"], entry["method"], entry["architecture"], entry["metric"]) == here
        if same and (name == entry["dataset"] or name.startswith(entry["dataset"] + "-")):
            return entry
    return None


def _data_note(record: Record) -> str:
    """What a record says of its data, and of which fold it is said."""
    fold = f"Fold {record['fold']}: " if record.get("fold") is not None else ""
    return fold + record["dataset"]["note"]


def _distinct(values: Iterable, form: Callable = str) -> str:
    return " / ".join(form(value) for value in sorted(set(values)))


def caption(group: Group) -> str:
    records = [record for method in group.methods for record in method.records]
    places = [record["environment"] for record in records]
    seeds = sorted({record["seed"] for record in records})
    folds = sorted({record["fold"] for record in records if record.get("fold") is not None})
    several = f"mean ± sample standard deviation over n {'runs' if len(folds) > 1 else 'seeds'}"
    spread = several if len(seeds) * max(len(folds), 1) > 1 else "one seed, so no spread is known"
    steps = _distinct((record["training"]["steps"] for record in records), "{:,}".format)
    numbers = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    if folds:
        numbers += f", fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))} of 5"
    read = {entry.get("test_tokens") for record in records for entry in record["quality"]} - {None}
    part = f", tested on {max(read):,} bytes" if read and max(read) < 0.99 * group.dataset.get("bytes", {"test": 0})["test"] else ""
    asked = {entry.get("test_targets") for record in records for entry in record["quality"]} - {None}
    if "pieces" in group.dataset and asked:
        part = f", loss in nats of {max(asked):,} masked pieces"
    model = "".join(f"{name} on " for name in named_architecture(records[0]))
    start = f", pre-trained on {pretraining(records[0])}" if pretraining(records[0]) else ""
    return (
        f"{model}{group.dataset['title']}{start}, preset {group.preset}: {spread} ({numbers}), {steps} steps{part}, "
        f"{_distinct(p['precision'] for p in places)}, threads: {_distinct(p['threads'] for p in places)}, "
        f"device: {_distinct(p.get('device_name') or p['device'] for p in places)}."
    )


def build_table(group: Group, table: str, entries: list[dict]) -> Table:
    """The rows of one group, best quality marked; the published column only where the paper has a number for one of the methods."""
    counts = {m.records[0]["model"]["num_experts"] for m in group.methods if m.sparse}
    half, full = (f"E/2 = {next(iter(counts)) // 2}", f"E = {next(iter(counts))}") if len(counts) == 1 else ("E/2", "E")
    shown = f"{split_of(group.methods[0].records[0]).capitalize()} {group.metric['name']}"
    header = ["Method", f"{shown}, k = {half}", f"{shown}, k = {full}", "Parameters", "Activated parameters, E/2 / E"]
    header += ["Training time (s), wall / CPU", "Inference FLOPs per token, E/2 / E"]
    rows, published = [], [published_for(group, method, table, entries) for method in group.methods]
    for method in group.methods:
        seconds = (statistics.median(record["training"][name] for record in method.records) for name in ("seconds", "cpu_seconds"))
        rows.append([Cell(f"{method.title} (n = {len(method.records)})"), quality_cell(method, "E/2"), quality_cell(method, "E")])
        rows[-1] += [Cell(short_number(method.records[0]["parameters"]["total"])), _pair_cell(method, "active_parameters")]
        rows[-1] += [Cell(" / ".join(f"{value:,.0f}" for value in seconds)), _pair_cell(method, "flops_per_token")]
    for column in (1, 2):
        mark_best(rows, column, group.metric["lower_is_better"])
    routed = [[record["routing"] for record in method.records if record.get("routing")] for method in group.methods]
    if any(routed):
        header.append("Load entropy (of 1) / routes changing late, k = E/2")
        for row, found in zip(rows, routed, strict=True):
            row.append(_routing_cell(found))
    notes = ["Training time is the median over seeds, validations left out; where a run shared its machine, CPU seconds say more."]
    if any(routed):
        entropy = "Load entropy: of the experts' shares of assignments, over log E."
        notes.append(f"{entropy} Routes changing late: share of tokens whose top expert differs between the last two checkpoints.")
    known = [(method.title, entry) for method, entry in zip(group.methods, published, strict=True) if entry]
    if known:
        header.append(f"Published ({known[0][1]['dataset']}, paper), E/2 / E")
        for row, entry in zip(rows, published, strict=True):
            values = entry["values"] if entry else {}
            row.append(Cell(" / ".join(str(values.get(share, DASH)) for share in ("E/2", "E")) if values else DASH))
        notes += [f"Published, {title}: {entry['source']} ({entry['setting']}); {entry['note']}." for title, entry in known]
    of_data = {_data_note(record) for method in group.methods for record in method.records if "note" in record["dataset"]}
    notes += [f"{note}." for note in sorted(of_data)]
    return Table(f"{table}:{group.stem('-')}", caption(group), header, rows, notes)


def to_markdown(table: Table) -> str:
    """GitHub Markdown: caption, table, notes."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [line(f"**{cell.text}**" if cell.bold else cell.text for cell in row) for row in table.rows]
    ruler = "|:---|" + "---:|" * (len(table.header) - 1)
    return "\n".join([f"**{table.caption}**", "", line(table.header), ruler, *rows, "", " ".join(table.notes)])


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return text.replace("±", r"$\pm$").replace(DASH, "--").replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")


def to_latex(table: Table) -> str:
    """A LaTeX table with booktabs rules."""
    rows = [" & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row) + r" \\" for row in table.rows]
    head = " & ".join(_tex(name) for name in table.header) + r" \\"
    caption = _tex(" ".join([table.caption, *table.notes]))
    columns = "l" + "r" * (len(table.header) - 1)
    top = [r"\begin{table}", r"\centering\small", rf"\caption{{{caption}}}", rf"\label{{{table.label}}}"]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*top, *body, r"\end{table}"]) + "\n"


def update_readme(path: Path, table: str, text: str) -> None:
    """Puts `text` between the table's two markers and leaves every other byte as it is."""
    begin, end = f"<!-- {table}:begin -->", f"<!-- {table}:end -->"
    try:
        before = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise UserError(f"{path}: the lines '{begin}' and '{end}' have to stand in it once each, in this order, around the table.")
    head, tail = before[: before.index(begin) + len(begin)], before[before.index(end) :]
    path.write_bytes(f"{head}\n{text}\n{tail}".encode())


def collect(run_dirs: Iterable[Path], table: str, folder: Path | None = None, force: bool = False) -> list[Path]:
    """Copies finished runs' records into `folder`, by default results/TABLE, under their canonical names; nothing is written if one of them
    is refused.
    """
    planned: dict[Path, tuple[Path, Record]] = {}
    for run_dir in run_dirs:
        path = run_dir / "result.json"
        record = read_record(path)
        if record["status"] != "complete":
            raise UserError(f"{path}: the run's status is '{record['status']}'; only a complete run can be collected.")
        if record["table"] != table:
            raise UserError(f"{path}: the record belongs to '{record['table']}'; give --table {record['table']}, not {table}.")
        fold = [f"fold{record['fold']}"] if record.get("fold") is not None else []
        parts = (*setting(record), record["method"], *fold, f"seed{record['seed']}")
        target = (folder or Path("results") / table) / f"{'-'.join(map(slug, parts))}.json"
        if target in planned and planned[target][1] != record:
            raise UserError(f"{path}: would get the same name as {planned[target][0]}, {target.name}; collect only one of the two.")
        if target.exists() and not force and json.loads(target.read_text(encoding="utf-8")) != record:
            raise UserError(f"{target}: holds another run than {path}; give --force to replace it.")
        planned[target] = (path, record)
    for target, (path, _) in planned.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return list(planned)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m utils.reporting.tables", description="Tables and figures from the records of finished runs."
    )
    paths = {"type": Path, "nargs": "+", "metavar": "PATH", "default": []}
    parser.add_argument("--results", **paths, help="folders or files of records (default: results/TABLE)")
    parser.add_argument("--runs", **paths, help="folders with runs, searched for result.json")
    parser.add_argument("--collect", **paths, help="finished runs to copy into results/TABLE")
    parser.add_argument("--force", action="store_true", help="let --collect replace a record of other content")
    parser.add_argument("--table", default="table1", help="the table that records belong to (default: table1)")
    parser.add_argument("--readme", type=Path, help="Markdown file with <!-- TABLE:begin --> and <!-- TABLE:end --> around the table")
    parser.add_argument("--latex", type=Path, help="LaTeX file to write (booktabs)")
    parser.add_argument("--figs", type=Path, help="folder to draw the figures into")
    parser.add_argument("--prefix", default="", help="put before the names of figures of records")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    args = _parse(argv)
    if args.collect:
        for target in collect(args.collect, args.table, force=args.force):
            print(f"collected {target}", file=sys.stderr)
        if not (args.readme or args.latex or args.figs):
            return
    sources = args.results or ([] if args.runs else [Path("results") / args.table])
    groups = group_records(load_records(find_records(sources, args.runs), args.table))
    if not groups:
        where = ", ".join(map(str, [*sources, *args.runs]))
        raise UserError(f"{where}: there is no complete record of '{args.table}'; finish a run first, then give --runs or --collect.")
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["entries"]
    tables = [build_table(group, args.table, published) for group in groups]
    text = "\n\n".join(map(to_markdown, tables))
    print(text)
    if args.readme:
        update_readme(args.readme, args.table, text)
    if args.latex:
        args.latex.parent.mkdir(parents=True, exist_ok=True)
        args.latex.write_text("\n".join(map(to_latex, tables)), encoding="utf-8")
    if args.figs:
        from utils.reporting.figures import draw_all  # here, because it imports matplotlib, which tables do without

        for path in draw_all(groups, args.figs, args.prefix):
            print(f"drawn {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
