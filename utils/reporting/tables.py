"""Tables of methods, and any table as Markdown or LaTeX."""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from utils.formatting import short_number
from utils.reporting.groups import Group, Row, entry_at, mean_and_spread, quality_points
from utils.reporting.labels import Record
from utils.reporting.records import PUBLISHED, split_of

DASH = "–"


@dataclass
class Cell:
    """One table cell; `value` is set where the best of a column is to be found."""

    text: str = DASH
    value: float | None = None
    bold: bool = False


@dataclass
class Table:
    """A table before it is written as Markdown or LaTeX. notes: of this table. footnotes: stand once below all tables of a page."""

    label: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)


def spread_text(values: list[float], form: str) -> str:
    """The mean, and the spread if there is one."""
    mean, spread = mean_and_spread(values)
    return f"{mean:{form}}" + (f" ± {spread:{form}}" if len(values) > 1 else "")


def form_of(metric: dict) -> str:
    """Digits of a quality: three, or of a percentage one."""
    return ".3f" if metric["lower_is_better"] else ".1f"


def _values(row: Row, share: str, name: str) -> list[float]:
    entries = [entry_at(record, share) for record in row.records]
    return [entry[name] for entry in entries if entry is not None]


def quality_cell(row: Row, share: str) -> Cell:
    values, form = _values(row, share, split_of(row.records[0])), form_of(row.records[0]["metric"])
    if not values:
        return Cell()
    # The row's own n stands beside its label; here only where a seed lacks this k.
    text = spread_text(values, form) + (f" (n = {len(values)})" if len(values) < len(row.records) else "")
    return Cell(text, value=float(f"{statistics.mean(values):{form}}"))


def _pair_cell(row: Row, name: str) -> Cell:
    values = [_values(row, share, name) for share in ("E/2", "E")]
    return Cell(" / ".join(short_number(statistics.mean(v)) if v else DASH for v in values) if any(values) else DASH)


def _small_cell(row: Row, ks: list[int]) -> Cell:
    """Mean quality at every k below E/2."""
    means, form = {k: mean for k, _, mean, _ in quality_points(row)}, form_of(row.records[0]["metric"])
    return Cell(" / ".join(f"{means[k]:{form}}" if k in means else DASH for k in ks) if row.sparse else DASH)


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


def published_for(record: Record, table: str) -> dict | None:
    """The published entry of a run: same table, method, settings, architecture and metric, and a dataset of the same family
    (enwik8-prefix: enwik8).
    """
    name = record["dataset"]["name"]
    here = (table, record["method"], record["settings"], record["model"]["architecture"], record["metric"]["name"])
    for entry in json.loads(PUBLISHED.read_text(encoding="utf-8"))["entries"]:
        same = tuple(entry[key] for key in ("table", "method", "settings", "architecture", "metric")) == here
        if same and (name == entry["dataset"] or name.startswith(entry["dataset"] + "-")):
            return entry
    return None


def published_column(table: Table, group: Group, name: str) -> list[tuple[str, dict]]:
    """Appends the paper's numbers where there are any; returns them by the rows' labels."""
    found = [published_for(row.records[0], name) for row in group.rows]
    known = [(row.label, entry) for row, entry in zip(group.rows, found, strict=True) if entry]
    if known:
        table.header.append(f"Published (all of {known[0][1]['dataset']}), E/2 / E")
        for cells, entry in zip(table.rows, found, strict=True):
            values = entry["values"] if entry else {}
            cells.append(Cell(" / ".join(str(values.get(share, DASH)) for share in ("E/2", "E")) if values else DASH))
    return known


def _distinct(values: Iterable, form: Callable = str) -> str:
    return " / ".join(form(value) for value in sorted(set(values)))


def caption(group: Group) -> str:
    """Data, preset, seeds, steps and machine."""
    records = group.records
    places = [record["environment"] for record in records]
    seeds = sorted({record["seed"] for record in records})
    folds = sorted({record["fold"] for record in records if record.get("fold") is not None})
    several = f"mean ± sample standard deviation over n {'runs' if len(folds) > 1 else 'seeds'}"
    spread = several if len(seeds) * max(len(folds), 1) > 1 else "one seed, spread unknown"
    numbers = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    if folds:
        numbers += f", fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))} of 5"
    read = {entry.get("test_tokens") for record in records for entry in record["quality"]} - {None}
    dataset = group.first["dataset"]
    part = f", tested on {max(read):,} bytes" if read and max(read) < 0.99 * dataset.get("bytes", {"test": 0})["test"] else ""
    targets = {entry.get("test_targets") for record in records for entry in record["quality"]} - {None}
    if "pieces" in dataset and targets:
        part = f", loss in nats over {max(targets):,} masked pieces"
    start = f", pre-trained on {group.start}" if group.start else ""
    return (
        f"{group.title}{start}: {spread} ({numbers}), {_distinct((r['training']['steps'] for r in records), '{:,}'.format)} steps{part}, "
        f"{_distinct(p['precision'] for p in places)}, threads: {_distinct(p['threads'] for p in places)}, "
        f"device: {_distinct(p.get('device_name') or p['device'] for p in places)}."
    )


def build_table(group: Group, name: str) -> Table:
    """Table 1 or 2 of one group, best quality marked; the published column only where the paper has a number for one of the methods."""
    counts = {row.experts for row in group.rows if row.sparse}
    half, full = (f"E/2 = {next(iter(counts)) // 2}", f"E = {next(iter(counts))}") if len(counts) == 1 else ("E/2", "E")
    shown = group.shown.capitalize()
    small = sorted({entry["k"] for row in group.rows if row.sparse for entry in row.records[0]["quality"] if entry["k"] < row.experts // 2})
    header = ["Method", f"{shown}, k = {half}", f"{shown}, k = {full}"]
    header += [f"Mean at k = {' / '.join(map(str, small))}"] * bool(small)
    header += ["Parameters", "Activated parameters, E/2 / E"]
    header += ["Training time (s), wall / CPU", "Inference FLOPs per token, E/2 / E"]
    table = Table(f"{name}:{group.stem}", caption(group), header, [])
    for row in group.rows:
        seconds = (statistics.median(record["training"][name] for record in row.records) for name in ("seconds", "cpu_seconds"))
        cells = [Cell(row.name), quality_cell(row, "E/2"), quality_cell(row, "E")]
        cells += [_small_cell(row, small)] * bool(small)
        cells += [Cell(short_number(row.records[0]["parameters"]["total"])), _pair_cell(row, "active_parameters")]
        table.rows.append([*cells, Cell(" / ".join(f"{value:,.0f}" for value in seconds)), _pair_cell(row, "flops_per_token")])
    for column in (1, 2):
        mark_best(table.rows, column, group.metric["lower_is_better"])
    table.footnotes = [
        "Training time: median over seeds, validations excluded. Where a run shared its machine, CPU seconds are the better measure."
    ]
    routed = [[record["routing"] for record in row.records if record.get("routing")] for row in group.rows]
    if any(routed):
        header.append("Load entropy (at most 1) / routes changing late, k = E/2")
        for cells, found in zip(table.rows, routed, strict=True):
            cells.append(_routing_cell(found))
        entropy = "Load entropy: entropy of the experts' shares of assignments, divided by log E."
        table.footnotes.append(f"{entropy} Routes changing late: tokens whose top expert differs between the last two checkpoints.")
    for label, entry in published_column(table, group, name):
        table.footnotes.append(f"Published, {label}: {entry['source']} ({entry['setting']}); {entry['note']}.")
    table.notes = [f"{note}." for note in sorted({_data_note(record) for record in group.records if "note" in record["dataset"]})]
    return table


def _data_note(record: Record) -> str:
    """A record's note on its data, with the fold."""
    fold = f"Fold {record['fold']}: " if record.get("fold") is not None else ""
    return fold + record["dataset"]["note"]


def to_markdown(table: Table) -> str:
    """GitHub Markdown: caption, table and its own notes."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [line(f"**{cell.text}**" if cell.bold else cell.text for cell in row) for row in table.rows]
    ruler = "|:---|" + "---:|" * (len(table.header) - 1)
    notes = ["", " ".join(table.notes)] if table.notes else []
    return "\n".join([f"**{table.caption}**", "", line(table.header), ruler, *rows, *notes])


def footnotes(tables: Iterable[Table]) -> str:
    """Those of all tables, each once."""
    return "\n".join(f"- {note}" for note in dict.fromkeys(note for table in tables for note in table.footnotes))


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return text.replace("±", r"$\pm$").replace(DASH, "--").replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")


def to_latex(table: Table) -> str:
    """A LaTeX table with booktabs rules; all notes stand in its caption."""
    rows = [" & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row) + r" \\" for row in table.rows]
    head = " & ".join(_tex(name) for name in table.header) + r" \\"
    caption = _tex(" ".join([table.caption, *table.notes, *table.footnotes]))
    columns = "l" + "r" * (len(table.header) - 1)
    top = [r"\begin{table}", r"\centering\small", rf"\caption{{{caption}}}", rf"\label{{{table.label}}}"]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*top, *body, r"\end{table}"]) + "\n"
