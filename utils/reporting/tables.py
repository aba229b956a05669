"""Tables: columns over the rows of a group, written as Markdown or LaTeX; Tables 1 and 2."""

import itertools
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from smoe_dropout.registry import METHODS, load
from utils.formatting import short_number
from utils.reporting.groups import Group, Row, frozen, mean_and_spread, method_groups, quality_points, settings_of
from utils.reporting.labels import Record
from utils.reporting.records import Found, read_published, split_of

DASH = "–"
FIXED_ROUTER = "random"  # the methods that differ in the schedule of k only, which get figures of their own
TIME = "Training time: median over seeds, validations excluded. CPU seconds are the better measure where runs shared a machine."
ENTROPY = "Load entropy: entropy of the experts' shares of assignments, divided by log E."
COLLAPSE = (
    "Collapse, at k = E/2, means over layers. Dead experts: those with less than 1 % of the even load. Similarity of experts: mean cosine "
    "of the outputs of two experts for the same token; 1 for equal experts."
)
CHANGES = "Routes changing late: share of the tokens whose top expert differs between the last two checkpoints."


class Figure(NamedTuple):
    """A file name, the caption on a page, and the function of utils.reporting.figures that draws it, with its arguments."""

    name: str
    caption: str
    function: str
    arguments: tuple


@dataclass
class Cell:
    """A table cell. value: set where the best of a column is marked."""

    text: str = DASH
    value: float | None = None
    bold: bool = False


@dataclass
class Table:
    """A table and its figures. notes: those of this table. footnotes: printed once below all tables of a page."""

    label: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


Column = tuple[str, Callable[[Row], Cell | str]]
PARAMETERS: Column = ("Parameters", lambda row: short_number(row.first["parameters"]["total"]))


def table_of(label: str, caption: str, group: Group, title: str, columns: list[Column], **more: Any) -> Table:
    """A column of row labels, then the others, with the best value of each marked. title: of the labels."""
    columns = [(title, lambda row: f"{row.label} (n = {len(row.records)})"), *columns]
    cells = [[cell(row) for _, cell in columns] for row in group.rows]
    rows = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in cells]
    for column in zip(*rows, strict=True):
        values = [cell.value for cell in column if cell.value is not None]
        best = (min if group.metric["lower_is_better"] else max)(values, default=None)
        for cell in column:
            cell.bold = len(values) > 1 and cell.value == best
    table = Table(f"{label}:{group.stem}", caption, [title for title, _ in columns], rows, **more)
    for row in group.rows:
        for record in (record for record in row.records if record.get("lost")):
            lost = "; ".join(record["lost"])
            table.footnotes.append(f"{row.label}, seed {record['seed']}: parts of its run folder were damaged and are lost: {lost}.")
    return table


def mean_cell(values: Iterable[float | None], form: str = ".3f", of: int = 0) -> Cell:
    """The mean of the known values, and the spread if there are several. of: the replicates in the row; some may lack the value."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell()
    mean, spread = mean_and_spread(known)
    text = f"{mean:{form}}" + (f" ± {spread:{form}}" if len(known) > 1 else "")
    return Cell(text + (f" (n = {len(known)})" if len(known) < of else ""), value=float(f"{mean:{form}}"))


def form_of(metric: dict) -> str:
    """Digits of a quality: three, or one of a perplexity or percentage."""
    return ".3f" if metric["lower_is_better"] and metric["name"] != "perplexity" else ".1f"


def values_at(row: Row, share: str, name: str) -> list[float]:
    """A value of the quality entries at k = E/2 or E (`share`); a dense model has a single one, at E."""
    if not row.records or (share != "E" and not row.sparse):
        return []
    wanted = (row.experts if share == "E" else row.experts // 2) if row.sparse else None
    return [entry[name] for record in row.records for entry in record["quality"] if entry["k"] == wanted]


def quality_column(title: str, share: str) -> Column:
    return title, lambda row: mean_cell(values_at(row, share, split_of(row.first)), form_of(row.first["metric"]), len(row.records))


def quality_columns(group: Group) -> list[Column]:
    """Quality at k = E/2, at E, and below E/2."""
    counts = {row.experts for row in group.rows if row.sparse}
    half, full = (f"E/2 = {min(counts) // 2}", f"E = {min(counts)}") if len(counts) == 1 else ("E/2", "E")
    shown = group.shown.capitalize()
    small = sorted({entry["k"] for row in group.rows for entry in row.first["quality"] if (entry["k"] or row.experts) < row.experts // 2})

    def small_cell(row: Row) -> str:
        means = {k: f"{mean:{form_of(group.metric)}}" for k, _, mean, _ in quality_points(row)}
        return " / ".join(means.get(k, DASH) for k in small) if row.sparse else DASH

    columns = [quality_column(f"{shown}, k = {half}", "E/2"), quality_column(f"{shown}, k = {full}", "E")]
    return columns + [(f"Mean at k = {' / '.join(map(str, small))}", small_cell)] * bool(small)


def attack_columns(group: Group) -> list[Column]:
    """Quality on corrupted input at k = E/2 and at E, for each kind of corruption that was tested."""
    said = {"swap": "words swapped for <unk>", "random": "random symbols"}
    columns, shown = [], f"{split_of(group.first)}_attacked"
    for attack in {frozen(record["attack"]): record["attack"] for record in group.records if "attack" in record}.values():
        for share in ("E/2", "E"):

            def cell(row: Row, attack=attack, share=share) -> Cell:
                tested = [record for record in row.records if record.get("attack") == attack]
                return mean_cell(values_at(replace(row, records=tested), share, shown), form_of(group.metric), len(row.records))

            columns.append((f"{100 * attack['rate']:g} % {said[attack['kind']]}, k = {share}", cell))
    return columns


def differences(row: Row, share: str, other: Row, other_share: str) -> list[float]:
    """Quality of `row` less that of `other`, each at k = E/2 or E, for each seed that both have."""

    def by_seed(row: Row, share: str) -> dict[int, float]:
        seeds = [record["seed"] for record in row.records]
        return dict(zip(seeds, values_at(row, share, split_of(row.first)), strict=False))  # a dense row has no value at E/2

    ours, theirs = by_seed(row, share), by_seed(other, other_share)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _pair_cell(row: Row, name: str) -> str:
    values = [values_at(row, share, name) for share in ("E/2", "E")]
    return " / ".join(short_number(statistics.mean(v)) if v else DASH for v in values) if any(values) else DASH


def _routing_cell(row: Row) -> str:
    """Means over seeds of the measurements of utils.training.routing."""
    found = [record["routing"] for record in row.records if record.get("routing")]
    changed = [one["fluctuation"] for one in found if one["fluctuation"] is not None]
    share = f"{100 * statistics.mean(changed):.0f} %" if changed else DASH
    return f"{statistics.mean(one['load_entropy'] for one in found):.3f} / {share}" if found else DASH


def _measured(row: Row, name: str, form: str) -> str:
    """Mean over seeds of a measurement that older records lack."""
    found = [value for record in row.records if (value := (record.get("routing") or {}).get(name)) is not None]
    return form.format(statistics.mean(found)).replace("%", " %") if found else DASH


def published(group: Group, name: str) -> tuple[list[Column], list[str]]:
    """A column of the paper's numbers and its footnotes, where there are any: for rows of the same table, method, settings, architecture
    and metric, and a dataset of the same family (enwik8-prefix: enwik8).
    """
    found: dict[str, dict[str, Any]] = {}
    for row, entry in itertools.product(group.rows, read_published()):
        one = row.first
        here = (name, one["method"], one["settings"], one["model"]["architecture"], one["metric"]["name"])
        same = tuple(entry[key] for key in ("table", "method", "settings", "architecture", "metric")) == here
        if same and f"{one['dataset']['name']}-".startswith(f"{entry['dataset']}-"):
            found.setdefault(row.label, entry)

    def cell(row: Row) -> str:
        values = found[row.label]["values"] if row.label in found else {}
        return " / ".join(str(values.get(share, DASH)) for share in ("E/2", "E")) if values else DASH

    notes = []
    for label, entry in found.items():
        setting = f" ({entry['setting']})" if "setting" in entry else ""
        notes.append(f"Published, {label}: {entry['source']}{setting}{'; ' + entry['note'] if 'note' in entry else ''}.")
    return [(f"Published (all of {entry['dataset']}), E/2 / E", cell) for entry in list(found.values())[:1]], notes


def replicates(records: list[Record]) -> str:
    """ "mean ± sample standard deviation over n seeds (seeds 1, 2, fold 3 of 5)" """
    seeds, folds = (sorted({record.get(name) for record in records} - {None}) for name in ("seed", "fold"))
    numbers = [
        f"{name}{'s' * (len(found) > 1)} {', '.join(map(str, found))}" for name, found in (("seed", seeds), ("fold", folds)) if found
    ]
    spread = f"mean ± sample standard deviation over n {'runs' if len(folds) > 1 else 'seeds'}"
    return f"{spread if len(seeds) * max(len(folds), 1) > 1 else 'one seed, spread unknown'} ({', '.join(numbers)}{' of 5' * bool(folds)})"


def caption(group: Group) -> str:
    """Data, preset, seeds, steps and machine."""

    def distinct(values: Iterable, form: Callable = str) -> str:
        return " / ".join(form(value) for value in sorted(set(values)))

    records, dataset = group.records, group.first["dataset"]
    places = [record["environment"] for record in records]
    read, targets = ({q.get(f"test_{unit}") or 0 for record in records for q in record["quality"]} for unit in ("tokens", "targets"))
    part = f", tested on {max(read):,} bytes" if 0 < max(read) < 0.99 * dataset.get("bytes", {"test": 0})["test"] else ""
    if "pieces" in dataset and max(targets):
        part = f", loss in nats over {max(targets):,} masked pieces"
    start = f", pre-trained on {group.start}" if group.start else ""
    return (
        f"{group.title}{start}: {replicates(records)}, {distinct((r['training']['steps'] for r in records), '{:,}'.format)} steps{part}, "
        f"{distinct(p['precision'] for p in places)}, threads: {distinct(p['threads'] for p in places)}, "
        f"device: {distinct(p.get('device_name') or p['device'] for p in places)}."
    )


def method_tables(name: str, found: Found, _only: list[str] | None = None) -> list[Table]:
    """Table 1 or 2: one table for each group."""
    return [_method_table(group, name) for group in method_groups([one for one in found if one[1]["table"] == name])]


def is_baseline(row: Row) -> bool:
    """Return whether the row is a method that every comparison shows, with its own settings."""
    method = row.first["method"]
    own = row.first["settings"] or settings_of(row.first, rows=True)
    return method in METHODS and load(METHODS, "method", method).baseline and not own


def _method_table(group: Group, name: str) -> Table:
    def seconds(row: Row, kind: str) -> float:
        return statistics.median(record["training"][kind] for record in row.records)

    def time_cell(row: Row) -> str:
        return " / ".join(f"{seconds(row, kind):,.0f}" for kind in ("seconds", "cpu_seconds"))

    columns = [
        *quality_columns(group),
        *attack_columns(group),
        PARAMETERS,
        ("Activated parameters, E/2 / E", lambda row: _pair_cell(row, "active_parameters")),
    ]
    columns += [("Training time (s), wall / CPU", time_cell)]
    columns += [("Inference FLOPs per token, E/2 / E", lambda row: _pair_cell(row, "flops_per_token"))]
    footnotes = [TIME]
    dense = next((row for row in group.rows if is_baseline(row) and not row.sparse), None)
    if dense and len(group.rows) > 1:

        def saved(value: float, whole: float) -> str:
            return f"{round(100 * (1 - value / whole)):+d}"

        def saved_cell(row: Row) -> str:
            whole = statistics.mean(values_at(dense, "E", "flops_per_token"))
            flops = [values_at(row, share, "flops_per_token") for share in ("E/2", "E")]
            parts = " / ".join(saved(statistics.mean(values), whole) if values else DASH for values in flops)
            return DASH if row is dense else f"{saved(seconds(row, 'cpu_seconds'), seconds(dense, 'cpu_seconds'))}; {parts}"

        columns.append(("Saved against dense (%): training CPU time; FLOPs, E/2 / E", saved_cell))
    if any(record.get("routing") for record in group.records):
        columns.append(("Load entropy (at most 1) / routes changing late, k = E/2", _routing_cell))
        footnotes.append(f"{ENTROPY} {CHANGES}")
    if any((record.get("routing") or {}).get("output_similarity") is not None for record in group.records):
        columns.append(("Dead experts, k = E/2", lambda row: _measured(row, "dead_experts", "{:.1%}")))
        columns.append(("Similarity of experts", lambda row: _measured(row, "output_similarity", "{:.3f}")))
        footnotes.append(COLLAPSE)
    more, sources = published(group, name)
    folds = {
        f"Fold {r['fold']}: " * (r.get("fold") is not None) + r["dataset"]["note"] + "." for r in group.records if "note" in r["dataset"]
    }
    made = table_of(name, caption(group), group, "Method", columns + more, notes=sorted(folds), footnotes=footnotes + sources)
    made.figures = _figures(group)
    return made


def _figures(group: Group) -> list[Figure]:
    """Quality and training curves, for all rows and for those with the frozen random router if these are two or more but not all."""
    fixed = [row for row in group.rows if not row.sparse or row.first["model"].get("router") == FIXED_ROUTER]
    several = not group.start and 1 < sum(row.sparse for row in fixed) < sum(row.sparse for row in group.rows)
    kind, against = ("by-k", "k") if group.start else ("slimmable", "activated parameters")
    figures = []
    for title, rows, name in [("", group.rows, kind), (", frozen random router", fixed, "frozen")][: 1 + several]:
        part, curves = replace(group, title=group.title + title, rows=rows), "frozen-curves" if title else "curves"
        figures.append(Figure(f"{group.stem}-{name}.png", f"{part.title}: quality against {against}", "draw_quality", (part,)))
        if any(record["curve"]["train"] or record["curve"]["valid"] for record in part.records):
            figures.append(Figure(f"{group.stem}-{curves}.png", f"{part.title}: training curves, and k by step", "draw_curves", (part,)))
    return figures


def _written(table: Table, bold: str, escape: Callable[[str], str], joint: str, line: str) -> list[str]:
    """Header and rows as lines. bold and line: with {} for their content."""
    cells = [[escape(cell.text) for cell in row] for row in table.rows]
    cells = [
        [bold.format(text) if cell.bold else text for text, cell in zip(*pair, strict=True)] for pair in zip(cells, table.rows, strict=True)
    ]
    return [line.format(joint.join(row)) for row in [[escape(title) for title in table.header], *cells]]


def to_markdown(table: Table) -> str:
    """GitHub Markdown: caption, table and its own notes."""
    head, *rows = _written(table, "**{}**", lambda text: text.replace("|", "\\|"), " | ", "| {} |")
    ruler = "|:---|" + "---:|" * (len(table.header) - 1)
    notes = ["", " ".join(table.notes)] if table.notes else []
    return "\n".join([f"**{table.caption}**", "", head, ruler, *rows, *notes])


def footnotes(tables: Iterable[Table]) -> str:
    """Those of all tables, each once."""
    return "\n".join(f"- {note}" for note in dict.fromkeys(note for table in tables for note in table.footnotes))


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return text.replace("±", r"$\pm$").replace(DASH, "--").replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")


def to_latex(table: Table) -> str:
    """A LaTeX table with booktabs rules; all notes are part of its caption."""
    head, *rows = _written(table, r"\textbf{{{}}}", _tex, " & ", r"{} \\")
    caption = _tex(" ".join([table.caption, *table.notes, *table.footnotes]))
    top = [r"\begin{table}", r"\centering\small", rf"\caption{{{caption}}}", rf"\label{{{table.label}}}"]
    body = [
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*top, *body, r"\end{table}"]) + "\n"
