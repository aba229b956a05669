"""The table of surgery, from the records of the runs that continued from it.

A record of train.py --start_from or of finetune.py holds the measurements of surgery.py. It is compared with records without surgery: the
same model fine-tuned whole, or trained for as many further steps, and models of that size trained from scratch. All qualities are at k = E.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from smoe_dropout.registry import SURGERIES
from utils.errors import UserError
from utils.flags.fields import COMPRESS
from utils.formatting import short_number
from utils.reporting.groups import Group, Row, frozen, gather, mean_and_spread, with_own_stems
from utils.reporting.labels import Record, method_label, operations_label, slug, training_label
from utils.reporting.records import Found, data_stem, replicate, split_of
from utils.reporting.tables import DASH, Column, Figure, Table, form_of, mean_cell, replicates, table_of

FURTHER = "after further training"
CURVES = [operations_label({"method": name} for name in (one, *more)) for more in ((), (COMPRESS,)) for one in SURGERIES]


def surgery_of(record: Record) -> dict | None:
    """The measurements of the operations that a run started from."""
    return record.get("pretrained", {}).get("surgery")


def final(quality: list[dict], name: str) -> float:
    """A value at the largest k."""
    return max(quality, key=lambda row: row["k"])[name]


def recovered(record: Record) -> float:
    return final(record["quality"], split_of(record))


def on_the_text(record: Record) -> bool:
    """Return whether surgery.py measured the same quality."""
    surgery = surgery_of(record)
    return record["metric"]["name"] == surgery["metric"]["name"] and record["dataset"]["fingerprint"] == surgery["tested_on"]


def directly_after(record: Record) -> float | None:
    surgery = surgery_of(record)
    return final(surgery["after"]["quality"], surgery["metric"]["split"]) if on_the_text(record) else None


def measured_alike(record: Record, other: Record) -> bool:
    return all(
        record[part][name] == other[part][name] for part, name in (("dataset", "fingerprint"), ("dataset", "name"), ("metric", "name"))
    )


def tuned_alike(record: Record, other: Record) -> bool:
    """Return whether both continued from trained weights, on the same data for as long."""
    started = other.get("pretrained", {}).get("transferred", False)
    return started and measured_alike(record, other) and record["training"]["steps"] == other["training"]["steps"]


def size_of(record: Record) -> dict[str, Any]:
    return {"quality": record["quality"], "parameters": record["parameters"]["total"]}


def whole(record: Record, others: list[Record]) -> dict[str, Any] | None:
    """Quality and parameters of the model before surgery: as measured, or fine-tuned as long on the same rows with the same seed."""
    surgery = surgery_of(record)
    if on_the_text(record):
        return surgery["before"]
    alike = (other for other in others if tuned_alike(record, other) and replicate(record) == replicate(other))
    return next((size_of(other) for other in alike if other["pretrained"]["sha256"] == surgery["source_sha256"]), None)


def before(record: Record, others: list[Record]) -> float | None:
    found = whole(record, others)
    return final(found["quality"], split_of(record)) if found else None


def from_scratch(record: Record, others: list[Record]) -> list[Record]:
    """Models of the same method with as many parameters, trained at that size from the first step; for a task, fine-tuned as long."""
    method, architecture, size = record["pretrained"]["method"], record["model"]["architecture"], record["parameters"]["total"]
    alike = [o for o in others if (o["method"], o["model"]["architecture"], o["parameters"]["total"]) == (method, architecture, size)]
    if on_the_text(record):
        return [other for other in alike if measured_alike(record, other) and "pretrained" not in other]
    return [other for other in alike if tuned_alike(record, other)]


def compressed(record: Record) -> bool:
    return any(one["method"] == COMPRESS for one in record["pretrained"]["operations"])


def time_of_a_pass(record: Record) -> float | None:
    """After over before; None for compressed experts that were timed before they were pruned."""
    surgery = surgery_of(record)
    return None if compressed(record) and "pruned_to" not in surgery else surgery["time"][0]["ratio"]


def row_label(record: Record) -> str:
    return operations_label(record["pretrained"]["operations"]) + (", taught" if "teacher" in record["pretrained"] else "")


def surgery_groups(found: Found) -> list[Group]:
    """By data, metric, and the trained model before surgery; rows by operations, training and size. Two trained models of one seed get a
    group each: seeds are averaged, trainings are not. UserError for records that one row cannot average.
    """
    others = [record for _, record in found if not surgery_of(record)]
    operated = [(path, record) for path, record in found if surgery_of(record)]

    def training(record: Record) -> str:
        return training_label(record["pretrained"] | {"operations": ()})

    def model_of(record: Record) -> tuple[str, ...]:
        return record["dataset"]["title"], record["metric"]["name"], method_label(record | {"settings": {}}), training(record)

    def run_of(record: Record) -> tuple:
        return (*model_of(record), record["pretrained"].get("seed", record["seed"]))

    models = {(run_of(record), surgery_of(record)["source_sha256"]) for _, record in operated}
    trained = [run for run, _ in models]
    twice = {run[:-1] for run in trained if trained.count(run) > 1}

    def group_of(record: Record) -> tuple[str, ...]:
        key = model_of(record)
        return (*key, surgery_of(record)["source_sha256"][:4]) if key in twice else key

    def row_of(record: Record) -> tuple:
        return row_label(record).lower(), record["training"]["steps"], frozen([record["settings"], record["preset_settings"]])

    groups = []
    for rows in gather(operated, group_of, row_of, row_label, same_in_row=("preset",)):
        rows.sort(key=lambda row: -sum(surgery_of(row.first)["after"]["experts"]))
        for row in rows:
            for alike in zip(*(record["pretrained"]["operations"] for record in row.records), strict=True):
                # The first records of compressed models do not name the data that decided an operation.
                if len(read := {frozen(one["read"]): one for one in alike if one.get("read")}) > 1:
                    raise UserError(f"'{row.label}' on {training(row.first)}: the operations read {' and '.join(read)}; leave one out")
        first = rows[0].first
        _, _, label, start, *model = group_of(first)
        title = ", ".join([label, *(f"model {one}" for one in model)])
        groups.append(Group(title, "-".join([data_stem(first), slug(first["method"]), *model]), rows, start, others))
    return with_own_stems(groups)


def build_table(group: Group) -> Table:
    """Quality before, directly after, after further training, and from scratch; size and time of a pass."""
    first, form, others = group.first, form_of(group.metric), group.others

    def mean(value: Callable[[Record], float | None], row: Row, form: str = form, unit: str = "") -> str:
        text = mean_cell(map(value, row.records), form).text
        return text if text == DASH else unit + text

    def experts(row: Row) -> str:
        """The experts of each layer, one seed after the other where they differ."""
        found = [surgery_of(record)["after"]["experts"] for record in row.records]
        return "; ".join(dict.fromkeys(str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes)) for sizes in found))

    def sizes(value: Callable[[dict], float], row: Row) -> str:
        return " / ".join(short_number(value(one)) if one else DASH for one in (whole(row.first, others), size_of(row.first)))

    columns: list[Column] = [
        ("Experts of each layer", experts),
        ("Before", partial(mean, lambda record: before(record, others))),
        ("Directly after", partial(mean, directly_after)),
        (FURTHER.capitalize(), lambda row: f"{mean(recovered, row)}, {row.first['training']['steps']:,} steps"),
        ("From scratch at that size", lambda row: mean_cell(map(recovered, from_scratch(row.first, others)), form).text),
        ("Parameters, before / after", partial(sizes, lambda one: one["parameters"])),
        ("FLOPs per token, before / after", partial(sizes, lambda one: final(one["quality"], "flops_per_token"))),
        ("Pass time, after / before", lambda row: mean(time_of_a_pass, row, ".2f", "× ")),
    ]
    footnotes = [
        "Pass time: ratio of evaluation passes with all experts active, medians of alternating passes, as measured by surgery.py.",
        f"{DASH}: not run, or undefined: a task has no quality before its training.",
    ]
    if on_the_text(first) and any(map(compressed, group.records)):
        footnotes.append("Compress, directly after: with S still whole; it is pruned during further training.")
    shown = f"{group.shown} on {first['dataset']['title']}"
    caption = f"Surgery on {group.title}, pre-trained on {group.start}: {shown}, all experts active, {replicates(group.records)}."
    figure = Figure(f"{group.stem}.png", f"Surgery on {group.title}: quality against stored parameters", "draw_surgery", (group,))
    return table_of("surgery", caption, group, "Operation", columns, notes=_controls(group), footnotes=footnotes, figures=[figure])


def _controls(group: Group) -> list[str]:
    """Notes on the models before surgery that were trained for some further steps."""
    sources = {surgery_of(record)["source_sha256"] for record in group.records}
    steps: dict[int, list[float]] = {}
    for other in group.others if on_the_text(group.first) else ():
        if measured_alike(group.first, other) and other.get("pretrained", {}).get("sha256") in sources:
            steps.setdefault(other["training"]["steps"], []).append(recovered(other))
    form = form_of(group.metric)
    notes = [(count, mean_cell(known, form).text, len(known)) for count, known in sorted(steps.items())]
    return [f"{count:,} further steps without surgery: {text} (n = {n})." for count, text, n in notes]


def surgery_tables(found: Found, _only: list[str] | None = None) -> list[Table]:
    """A table and a figure for each trained model, or each method where seeds are averaged."""
    return [build_table(group) for group in surgery_groups(found)]


def curves(group: Group, directly: bool) -> dict[str, list[tuple[float, float, float]]]:
    """(millions of stored parameters, mean quality, spread) of each row, directly after surgery or after further training."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in group.rows:
        name = operations_label({"method": one["method"]} for one in row.first["pretrained"]["operations"] if one["method"] != "train")
        size = surgery_of(row.first)["after"]["parameters"] if directly else row.first["parameters"]["total"]
        point = size / 1e6, *mean_and_spread(map(directly_after if directly else recovered, row.records))
        found.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in sorted(found.items())}
