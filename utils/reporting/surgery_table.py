"""The table and the figure of surgery, from the records of the runs that went on from it.

A record of train.py --start_from or of finetune.py holds what surgery.py measured. Records without surgery are what it is held against: the
same model fine-tuned whole, or trained on for as long, and one of that size trained from random weights. All qualities are at k = E.
"""

from collections.abc import Callable, Iterable
from typing import Any

from smoe_dropout.registry import SURGERIES
from utils.errors import UserError
from utils.flags.fields import COMPRESS
from utils.formatting import short_number
from utils.reporting.groups import Found, Group, Row, frozen, gather, mean_and_spread, with_own_stems
from utils.reporting.labels import Record, method_label, operations_label, slug, training_label
from utils.reporting.records import data_stem, replicate, split_of
from utils.reporting.tables import DASH, Cell, Table, form_of, spread_text


def surgery_of(record: Record) -> dict | None:
    """The measurements of the operations that a run started from."""
    return record.get("pretrained", {}).get("surgery")


def source_of(record: Record) -> dict[str, Any]:
    """The training of the model that was operated on, without what was done to it."""
    return {name: value for name, value in record["pretrained"].items() if name != "operations"}


def final(quality: list[dict], split: str) -> float:
    """At the largest k."""
    return max(quality, key=lambda row: row["k"])[split]


def measured_alike(record: Record, other: Record) -> bool:
    same = ("fingerprint", "name")
    return all(record["dataset"][name] == other["dataset"][name] for name in same) and record["metric"]["name"] == other["metric"]["name"]


def on_the_text(record: Record) -> bool:
    """Whether its quality is the one that surgery.py measured, too."""
    surgery = surgery_of(record)
    return record["metric"]["name"] == surgery["metric"]["name"] and record["dataset"]["fingerprint"] == surgery["tested_on"]


def tuned_alike(record: Record, other: Record) -> bool:
    """Whether both went on from trained weights, on the same data for as long."""
    started = other.get("pretrained", {}).get("transferred", False)
    return started and measured_alike(record, other) and record["training"]["steps"] == other["training"]["steps"]


def whole(record: Record, others: list[Record]) -> dict | None:
    """Quality and parameters of the model that was operated on: as measured, or fine-tuned as long on the same rows with the same seed."""
    surgery = surgery_of(record)
    if on_the_text(record):
        return surgery["before"]
    for other in others:
        same = tuned_alike(record, other) and replicate(record) == replicate(other)
        if same and other["pretrained"]["sha256"] == surgery["source_sha256"]:
            return {"quality": other["quality"], "parameters": other["parameters"]["total"]}
    return None


def before(record: Record, others: list[Record]) -> float | None:
    found = whole(record, others)
    return final(found["quality"], split_of(record)) if found else None


def directly_after(record: Record) -> float | None:
    surgery = surgery_of(record)
    return final(surgery["after"]["quality"], surgery["metric"]["split"]) if on_the_text(record) else None


def compressed(record: Record) -> bool:
    return any(one["method"] == COMPRESS for one in record["pretrained"]["operations"])


def time_of_a_pass(record: Record) -> float | None:
    """After over before; None for compressed experts that were timed before they were pruned."""
    surgery = surgery_of(record)
    return None if compressed(record) and "pruned_to" not in surgery else surgery["time"][0]["ratio"]


def recovered(record: Record) -> float:
    return final(record["quality"], split_of(record))


def from_scratch(record: Record, others: list[Record]) -> list[Record]:
    """Models of the same method with as many parameters, trained at that size from the first step on; for a task, fine-tuned as long."""

    def comparable(other: Record) -> bool:
        if not on_the_text(record):
            return tuned_alike(record, other)
        return measured_alike(record, other) and "pretrained" not in other

    return [
        other
        for other in others
        if comparable(other)
        and other["method"] == record["pretrained"]["method"]
        and other["model"]["architecture"] == record["model"]["architecture"]
        and other["parameters"]["total"] == record["parameters"]["total"]
    ]


def trained_on(group: Group) -> list[Record]:
    """Records of the models that were operated on, trained on without surgery."""
    sources = {surgery_of(record)["source_sha256"] for record in group.records}
    return [
        other
        for other in group.others
        if on_the_text(group.first) and measured_alike(group.first, other) and other.get("pretrained", {}).get("sha256") in sources
    ]


def row_label(record: Record) -> str:
    return operations_label(record["pretrained"]["operations"]) + (", taught" if "teacher" in record["pretrained"] else "")


def surgery_groups(found: Found) -> list[Group]:
    """By data, metric, and the trained model that was operated on; rows by operations, training and size. Of two trained models of one
    seed, each has a group of its own: seeds are averaged, trainings are not. UserError for records that one row cannot average.
    """
    found = list(found)
    others = [record for _, record in found if not surgery_of(record)]
    operated = [(path, record) for path, record in found if surgery_of(record)]

    def model_of(record: Record) -> tuple[str, ...]:
        label = method_label(record | {"settings": {}})
        return record["dataset"]["title"], record["metric"]["name"], label, training_label(source_of(record))

    trainings: dict[tuple, dict[int, set[str]]] = {}
    for _, record in operated:
        seeds = trainings.setdefault(model_of(record), {})
        seeds.setdefault(record["pretrained"].get("seed", record["seed"]), set()).add(surgery_of(record)["source_sha256"])
    twice = {key for key, seeds in trainings.items() if any(len(models) > 1 for models in seeds.values())}

    def group_of(record: Record) -> tuple[str, ...]:
        key = model_of(record)
        return (*key, surgery_of(record)["source_sha256"][:8]) if key in twice else key

    def row_of(record: Record) -> tuple:
        return row_label(record).lower(), record["training"]["steps"], frozen([record["settings"], record["preset_settings"]])

    groups = []
    for (_, _, label, start, *model), rows in gather(operated, group_of, row_of, same_in_row=("preset",)).items():
        made = [Row(row_label(records[0]), records) for records in rows.values()]
        made.sort(key=lambda row: -sum(surgery_of(row.records[0])["after"]["experts"]))
        for row in made:
            _check_read(row)
        first = made[0].records[0]
        named = [f"model {one}" for one in model]
        stem = "-".join([data_stem(first), slug(first["method"]), *(one[:4] for one in model)])
        groups.append(Group(", ".join([label, *named]), stem, made, start, others))
    return with_own_stems(groups)


def _check_read(row: Row) -> None:
    """UserError where operations that are averaged were decided by other data. The first records of compressed models do not name them."""
    read = [(record, [one.get("read") for one in record["pretrained"]["operations"]]) for record in row.records]
    for record, mine in read:
        for other, theirs in read:
            if any(a and b and a != b for a, b in zip(mine, theirs, strict=True)):
                of = f"'{row.label}' on {training_label(source_of(record))}, seeds {other['seed']} and {record['seed']}"
                raise UserError(f"{of}: decided by {theirs} and {mine}: they are not one row, leave one out")


def _mean(values: Iterable[float | None], form: str = ".3f", unit: str = "") -> Cell:
    known = [value for value in values if value is not None]
    return Cell(unit + spread_text(known, form)) if known else Cell()


def build_table(group: Group) -> Table:
    """Quality before, directly after, after training on, and from scratch; size and time of a pass."""
    first, form = group.first, form_of(group.metric)
    header = ["Operation", "Experts of each layer", "Before", "Directly after", "After training on", "From scratch at that size"]
    header += ["Parameters, before / after", "FLOPs per token, before / after", "Pass time, after / before"]
    shown = f"{group.shown} on {first['dataset']['title']}"
    caption = f"Surgery on {group.title}, pre-trained on {group.start}: {shown}, all experts active, {seeds_of(group)}."
    table = Table(f"surgery:{group.stem}", caption, header, [])
    for row in group.rows:
        left = row.records[0]
        cells = [Cell(row.name), Cell(_experts(row.records)), _mean((before(record, group.others) for record in row.records), form)]
        cells += [_mean(map(directly_after, row.records), form)]
        cells += [Cell(f"{_mean(map(recovered, row.records), form).text}, {left['training']['steps']:,} steps")]
        cells += [_mean([recovered(other) for other in from_scratch(left, group.others)], form)]
        sizes = [whole(left, group.others), {"quality": left["quality"], "parameters": left["parameters"]["total"]}]
        cells += [Cell(" / ".join(short_number(size["parameters"]) if size else DASH for size in sizes))]
        cells += [Cell(" / ".join(short_number(final(size["quality"], "flops_per_token")) if size else DASH for size in sizes))]
        table.rows.append([*cells, _mean(map(time_of_a_pass, row.records), ".2f", "× ")])
    table.footnotes = [
        "Pass time: ratio of evaluation passes with all experts active, medians of alternating passes, as measured by surgery.py.",
        f"{DASH}: not run, or undefined: a task has no quality before its training.",
    ]
    if on_the_text(first) and any(map(compressed, group.records)):
        table.footnotes.append("Compress, directly after: with S still whole; it is pruned while training on.")
    for steps in sorted({record["training"]["steps"] for record in trained_on(group)}):
        known = [recovered(record) for record in trained_on(group) if record["training"]["steps"] == steps]
        table.notes.append(f"Trained on for {steps:,} steps without surgery: {_mean(known, form).text} (n = {len(known)}).")
    return table


def seeds_of(group: Group) -> str:
    seeds = sorted({record["seed"] for record in group.records})
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean ± sample standard deviation over n seeds (seeds {', '.join(map(str, seeds))})"


def _experts(records: list[Record]) -> str:
    """The experts of each layer, one seed after the other where they differ."""
    found = [surgery_of(record)["after"]["experts"] for record in records]
    texts = [str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes)) for sizes in found]
    return "; ".join(dict.fromkeys(texts))


def panels(group: Group) -> dict[str, tuple[Callable[[Record], float], Callable[[Record], int]]]:
    """Quality and stored parameters of a record, by the title of the figure's panel."""
    after = {"after training on": (recovered, lambda record: record["parameters"]["total"])}
    if not on_the_text(group.first):
        return after
    return {"directly after": (directly_after, lambda record: surgery_of(record)["after"]["parameters"]), **after}


def curves(group: Group, quality: Callable, size: Callable) -> dict[str, list[tuple[float, float, float]]]:
    """(millions of parameters, mean, spread) of each row, by the operations that rows of one curve share."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in group.rows:
        operations = [one["method"] for one in row.records[0]["pretrained"]["operations"] if one["method"] != "train"]
        name = operations_label({"method": method} for method in operations)
        found.setdefault(name, []).append((size(row.records[0]) / 1e6, *mean_and_spread([quality(record) for record in row.records])))
    return {name: sorted(points) for name, points in sorted(found.items())}


def references(group: Group) -> tuple[list[tuple[float, float]], list[float]]:
    """Models of those sizes from random weights (millions of parameters, quality), and the qualities before surgery."""
    scratch = {id(other): other for row in group.rows for other in from_scratch(row.records[0], group.others)}.values()
    known = [value for record in group.records if (value := before(record, group.others)) is not None]
    return [(other["parameters"]["total"] / 1e6, recovered(other)) for other in scratch], known


CURVES = [operations_label([{"method": name}]) for name in SURGERIES] + [
    operations_label([{"method": name}, {"method": COMPRESS}]) for name in SURGERIES
]
