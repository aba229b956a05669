"""The table and the figure of surgery, from the records of the runs that went on from it.

    python -m utils.reporting.surgery --readme README.md --figs Figs            # from results/surgery
    python -m utils.reporting.surgery --collect runs/a runs/b                   # take finished runs into results/surgery

A record of train.py --start_from or of finetune.py holds what surgery.py measured. Records without surgery are what it is held against: the
same model fine-tuned whole, or trained on for as long, and one of that size trained from random weights. All qualities are at k = E.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from smoe_dropout.registry import SURGERIES
from utils.errors import UserError, run_main
from utils.flags.fields import COMPRESS
from utils.formatting import short_number
from utils.reporting.records import Record, find_records, get, named_architecture, read_record, replicate, slug, split_of
from utils.reporting.tables import DASH, Cell, Table, to_markdown, update_readme

TABLE = "surgery"


@dataclass
class Row:
    """One operation, and the records of it, one a seed."""

    label: str
    records: list[Record]


@dataclass
class Group:
    """Operations on models trained alike, and measured on the same data; `others`: all records without surgery.

    name: title of the data, metric, what the operated model was trained on, its method, and where there are two trained models of one seed,
    the beginning of its sha256: seeds are averaged, trainings are not.
    """

    name: tuple[str, ...]
    rows: list[Row]
    others: list[Record]


def surgery_of(record: Record) -> dict | None:
    return record.get("pretrained", {}).get("surgery")


def final(quality: list[dict], split: str) -> float:
    """At the largest k."""
    return max(quality, key=lambda row: row["k"])[split]


def measured_alike(record: Record, other: Record) -> bool:
    same = ("fingerprint", "name")
    return all(record["dataset"][name] == other["dataset"][name] for name in same) and record["metric"]["name"] == other["metric"]["name"]


def of_the_text(record: Record) -> bool:
    """Whether its quality is the one that surgery.py measured, too."""
    surgery = surgery_of(record)
    return record["metric"]["name"] == surgery["metric"]["name"] and record["dataset"]["fingerprint"] == surgery["tested_on"]


def tuned_alike(record: Record, other: Record) -> bool:
    """Whether both went on from trained weights, on the same data for as long."""
    started = other.get("pretrained", {}).get("transferred", False)
    return started and measured_alike(record, other) and record["training"]["steps"] == other["training"]["steps"]


def whole(record: Record, others: list[Record]) -> dict | None:
    """Quality and parameters of the model that was operated on: as it was measured, or fine-tuned as long on the same rows with the same
    seed.
    """
    surgery = surgery_of(record)
    if of_the_text(record):
        return surgery["before"]
    found = [
        other
        for other in others
        if tuned_alike(record, other)
        and replicate(record) == replicate(other)
        and other["pretrained"]["sha256"] == surgery["source"]["sha256"]
    ]
    return {"quality": found[0]["quality"], "parameters": found[0]["parameters"]["total"]} if found else None


def before(record: Record, others: list[Record]) -> float | None:
    found = whole(record, others)
    return final(found["quality"], split_of(record)) if found else None


def directly_after(record: Record) -> float | None:
    surgery = surgery_of(record)
    return final(surgery["after"]["quality"], surgery["metric"]["split"]) if of_the_text(record) else None


def time_of_a_pass(record: Record) -> float | None:
    """After over before. Of compressed experts, None for a record of before their time was measured once more when they are pruned."""
    surgery = surgery_of(record)
    return None if surgery["method"] == COMPRESS and "pruned_to" not in surgery else surgery["time"][0]["ratio"]


def recovered(record: Record) -> float:
    return final(record["quality"], split_of(record))


def from_scratch(record: Record, others: list[Record]) -> list[Record]:
    """Models of the same method with as many parameters, trained at that size from the first step on; of a task, fine-tuned as long."""
    name = surgery_of(record)["source"]["method"]
    return [
        other
        for other in others
        if (measured_alike(record, other) and "pretrained" not in other if of_the_text(record) else tuned_alike(record, other))
        and other["method"].partition(" ")[0] == name
        and other["model"]["architecture"] == record["model"]["architecture"]
        and other["parameters"]["total"] == record["parameters"]["total"]
    ]


def trained_on(group: Group) -> list[Record]:
    """Records of the models that were operated on, trained on without surgery."""
    records = [record for row in group.rows for record in row.records]
    sources = {surgery_of(record)["source"]["sha256"] for record in records}
    return [
        other
        for other in group.others
        if of_the_text(records[0]) and measured_alike(records[0], other) and other.get("pretrained", {}).get("sha256") in sources
    ]


def group_records(records: list[Record]) -> list[Group]:
    """By data, metric, and what the operated model was trained on and how; rows by operation, training and size. A record found twice
    counts once. UserError for records that one row cannot average.
    """
    others = [record for record in records if not surgery_of(record)]
    groups: dict[tuple, dict[tuple, list[Record]]] = {}
    for name, record in _named([record for record in records if surgery_of(record)]):
        taught = ", taught" if "teacher" in record["pretrained"] else ""
        row = groups.setdefault(name, {}).setdefault((surgery_of(record)["label"] + taught, record["training"]["steps"]), [])
        if record not in row:
            _check_replicates(record, row)
            row.append(record)
    return [
        Group(name, [Row(label, sorted(found, key=replicate)) for (label, _), found in sorted(rows.items(), key=_order)], others)
        for name, rows in sorted(groups.items())
    ]


def _named(records: list[Record]) -> list[tuple[tuple[str, ...], Record]]:
    """Every record with the name of its group."""
    named, models = [], {}
    for record in records:
        source = surgery_of(record)["source"]
        name = (record["dataset"]["title"], record["metric"]["name"], source["title"], source["method"])
        named.append((name, record))
        models.setdefault(name, {}).setdefault(source["seed"], set()).add(source["sha256"])
    twice = {name for name, seeds in models.items() if any(len(found) > 1 for found in seeds.values())}
    return [((*name, f"model {surgery_of(record)['source']['sha256'][:8]}") if name in twice else name, record) for name, record in named]


def _check_replicates(record: Record, row: list[Record]) -> None:
    """UserError unless the record may stand in a row with these: one a seed, and everything else done alike."""
    for other in row:
        of = f"'{surgery_of(record)['label']}' on {surgery_of(record)['source']['title']}, seeds {other['seed']} and {record['seed']}"
        for name in ("preset", "pretrained.title", "pretrained.surgery.read"):
            said = get(other, name), get(record, name)
            if None not in said and said[0] != said[1]:  # the first records of compressed models do not say what their merging read
                raise UserError(f"{of}: {name} is {said[0]!r} and {said[1]!r}: they are not one row, leave one out.")
        if replicate(record) == replicate(other):
            raise UserError(f"{of}: two records of one seed with other content: leave one out.")


def _order(row: tuple[tuple[str, int], list[Record]]) -> tuple:
    (label, steps), records = row
    return -sum(surgery_of(records[0])["after"]["experts"]), label, steps


def _mean(values: Iterable[float | None], form: str = "{:.3f}", unit: str = "") -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell()
    spread = f" ± {form.format(statistics.stdev(known))}" if len(known) > 1 else ""
    return Cell(unit + form.format(statistics.mean(known)) + spread)


def build_table(group: Group) -> Table:
    first = group.rows[0].records[0]
    title, metric, start, method, *model = group.name
    form = "{:.3f}" if first["metric"]["lower_is_better"] else "{:.1f}"
    header = ["Operation", "Experts of each layer", "Before", "Directly after", "After training on", "From scratch at that size"]
    header += ["Parameters, before / after", "FLOPs a token, before / after", "Time of a pass"]
    rows = []
    for row in group.rows:
        left = row.records[0]
        scratch = [recovered(other) for other in from_scratch(left, group.others)]
        cells = [Cell(f"{row.label} (n = {len(row.records)})"), Cell(_experts(row.records))]
        cells += [_mean((before(record, group.others) for record in row.records), form), _mean(map(directly_after, row.records), form)]
        after = _mean(map(recovered, row.records), form)
        cells += [Cell(f"{after.text}, {left['training']['steps']:,} steps"), _mean(scratch, form)]
        sizes = [whole(left, group.others), {"quality": left["quality"], "parameters": left["parameters"]["total"]}]
        cells += [Cell(" / ".join(short_number(size["parameters"]) if size else DASH for size in sizes))]
        cells += [Cell(" / ".join(short_number(final(size["quality"], "flops_per_token")) if size else DASH for size in sizes))]
        cells += [_mean(map(time_of_a_pass, row.records), "{:.2f}", "× ")]
        rows.append(cells)
    shown = f"{split_of(first)} {metric}"
    caption = f"Surgery on {', '.join([method, *model])}, pre-trained on {start}: {shown} on {title}, all experts active, "
    caption += f"{_seeds(group)}."
    notes = [
        "Time of a pass: after over before, as surgery.py measured it, all experts of each active, medians of passes taken in turn.",
        f"{DASH}: not run, or not to be had: a task has no quality before its training.",
    ]
    if of_the_text(first) and any(surgery_of(row.records[0])["method"] == COMPRESS for row in group.rows):
        notes.append(f"{COMPRESS.capitalize()}, directly after: of the model whose S is still whole; it is pruned in training on.")
    for steps in sorted({record["training"]["steps"] for record in trained_on(group)}):
        found = [recovered(record) for record in trained_on(group) if record["training"]["steps"] == steps]
        notes.append(f"Trained on for {steps:,} steps without surgery: {_mean(found, form).text} (n = {len(found)}).")
    return Table(f"{TABLE}:{slug(' '.join(group.name))}", caption, header, rows, notes)


def _seeds(group: Group) -> str:
    """Which, and what the numbers are where there are several."""
    seeds = sorted({record["seed"] for row in group.rows for record in row.records})
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean ± sample standard deviation over n seeds (seeds {', '.join(map(str, seeds))})"


def _experts(records: list[Record]) -> str:
    """Of each layer, one seed after the other where they differ."""
    found = [surgery_of(record)["after"]["experts"] for record in records]
    words = [str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes)) for sizes in found]
    return "; ".join(dict.fromkeys(words))


def figure_of(group: Group) -> str:
    """The file's name."""
    return f"{TABLE}-{slug(' '.join(group.name))}.png"


def draw(group: Group, path: Path) -> None:
    """Quality against stored parameters, one curve a method: directly after, of the text itself, and after training on."""
    from utils.reporting import figures  # here, because it imports matplotlib, which tables do without
    from utils.reporting.figures import plt

    first = group.rows[0].records[0]
    panels = {"after training on": (recovered, lambda record: record["parameters"]["total"])}
    if of_the_text(first):
        panels = {"directly after": (directly_after, lambda record: surgery_of(record)["after"]["parameters"]), **panels}
    with plt.rc_context(figures.STYLE):
        chart, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels) + 1, 4.3), squeeze=False, layout="constrained")
        for ax, (title, (quality, size)) in zip(axes[0], panels.items(), strict=True):
            _curves(ax, group, quality, size, figures)
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("stored parameters (millions)")
        _held_against(axes[0][-1], group)
        direction = "lower is better" if first["metric"]["lower_is_better"] else "%"
        axes[0][0].set_ylabel(f"{split_of(first)} {group.name[1]} ({direction})")
        chart.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        chart.suptitle(f"Surgery on {', '.join(group.name[3:])}: {group.name[0]}, all experts active\n{_seeds(group)}", fontsize=10.5)
        figures.save(chart, path)


def _curves(ax, group: Group, quality: Callable[[Record], float], size: Callable[[Record], int], figures) -> None:
    methods: dict[tuple[str, ...], list[tuple[float, float, float]]] = {}
    for row in group.rows:
        known = [quality(record) for record in row.records]
        spread = statistics.stdev(known) if len(known) > 1 else 0.0
        point = size(row.records[0]) / 1e6, statistics.mean(known), spread
        methods.setdefault(_operations(row.label), []).append(point)
    names = sorted({*SURGERIES, COMPRESS})  # a method looks the same in every figure
    for operations, points in sorted(methods.items()):
        index = names.index(operations[-1])
        look = {"color": figures.COLOURS[index], "marker": figures.MARKERS[index % len(figures.MARKERS)]}
        sizes, means, spreads = zip(*sorted(points), strict=True)
        bars = {"yerr": spreads, "capsize": 3} if any(spreads) else {}
        ax.errorbar(sizes, means, **bars, label=" + ".join(operations), **look)


def _operations(label: str) -> tuple[str, ...]:
    """The methods that a row's label names, in their order."""
    return tuple(word for part in label.split(", ") if (word := part.split()[0]) in (*SURGERIES, COMPRESS))


def _held_against(ax, group: Group) -> None:
    """Models of those sizes from random weights, and the model that was operated on."""
    scratch = {id(other): other for row in group.rows for other in from_scratch(row.records[0], group.others)}.values()
    if scratch:
        sizes, values = zip(*((other["parameters"]["total"] / 1e6, recovered(other)) for other in scratch), strict=True)
        ax.plot(sizes, values, "*", color="black", markersize=12, markerfacecolor="none", label="from scratch")
    known = [value for row in group.rows for record in row.records if (value := before(record, group.others)) is not None]
    if known:
        ax.axhline(statistics.mean(known), color="#666666", linewidth=0.9, linestyle="--", label="before")


def collect(runs: Iterable[Path], results: Path) -> list[Path]:
    """Copies finished runs' records, with surgery or without, under names that say what they are. UserError for one of another content."""
    planned = {}
    for run in runs:
        path = run / "result.json"
        record = read_record(path)
        if record["status"] != "complete":
            raise UserError(f"{path}: the run's status is '{record['status']}'; only a complete run can be collected.")
        target = results / f"{'-'.join(map(slug, _words(record)))}.json"
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise UserError(f"{target}: holds another run than {path}; remove one of them.")
        planned[target] = path.read_bytes()
    for target, content in planned.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return list(planned)


def _words(record: Record) -> list[str]:
    """What a file name says: no title of what the model was trained on and no list of departures, which together are too long for one."""
    start, surgery = record.get("pretrained"), surgery_of(record)
    words = [record["dataset"]["name"], *named_architecture(record), record["preset"]]
    words += [record["method"].partition(" ")[0], surgery["label"]] if surgery else [record["method"]]
    words += ["taught"] if start and "teacher" in start else []
    words += [f"from {start['sha256'][:8]}"] if start else []
    return [*words, f"steps{record['training']['steps']}", f"seed{record['seed']}"]


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m utils.reporting.surgery", description="Table and figure of surgery.")
    paths = {"type": Path, "nargs": "+", "metavar": "PATH", "default": []}
    parser.add_argument("--results", **paths, help="folders or files of records (default: results/surgery)")
    parser.add_argument("--runs", **paths, help="folders with runs, searched for result.json")
    parser.add_argument("--collect", **paths, help="finished runs to copy into results/surgery")
    parser.add_argument("--readme", type=Path, help="Markdown file with <!-- surgery:begin --> and <!-- surgery:end --> around the table")
    parser.add_argument("--figs", type=Path, help="folder to draw the figures into")
    args = parser.parse_args(argv)
    if args.collect:
        for target in collect(args.collect, Path("results") / TABLE):
            print(f"collected {target}", file=sys.stderr)
    sources = args.results or ([] if args.runs else [Path("results") / TABLE])
    records = [record for path in find_records(sources, args.runs) if (record := read_record(path))["status"] == "complete"]
    groups = group_records(records)
    if not groups:
        raise UserError(
            f"{', '.join(map(str, [*sources, *args.runs]))}: there is no record of a run that went on from surgery; finish one first."
        )
    parts = [
        (to_markdown(build_table(group)).strip(), f"![{', '.join(group.name[3:])}: quality against parameters](Figs/{figure_of(group)})")
        for group in groups
    ]
    text = "\n\n".join(part for both in parts for part in both)
    print(text)
    if args.readme:
        update_readme(args.readme, TABLE, text)
    for group in groups if args.figs else []:
        path = args.figs / figure_of(group)
        draw(group, path)
        print(f"drawn {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
