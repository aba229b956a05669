"""The schema of a record, result.json: the fields that tables, figures and labels read. A record may hold more. Imports no torch.

For `documents.read`: a field with a default may be missing; with the default UNSET it cannot be null either. What one field says about
another is checked by `contradiction`.
"""

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

from msgspec import UNSET, Meta, Struct, UnsetType, defstruct, field

from utils.documents import Count
from utils.flags.declare import specs
from utils.flags.fields import FinetuneFlags

SCHEMA, COMPLETE = 2, "complete"
Text = Annotated[str, Meta(pattern=r"^(?=.*\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029]+\Z")]  # one line that is not blank
Size = Annotated[int, Meta(ge=1)]
Amount = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1.001)]  # rounding may exceed 1
Scalar = bool | int | float | str | None


def _flag_types() -> list[tuple[str, Any, UnsetType]]:
    """Each flag with the type and the limits of its value."""
    found = []
    for name, spec in specs(FinetuneFlags).items():
        hint = get_type_hints(FinetuneFlags)[name]
        kind, *empty = get_args(hint) or (hint,)
        low = spec.low if spec.special is None else min(spec.special, spec.low)
        limits = {"ge": low, "le": spec.high, "gt": spec.above, "lt": spec.below}
        limited = Annotated[kind, Meta(**{limit: value for limit, value in limits.items() if value is not None})]
        found.append((name, limited | UnsetType | (None if empty else UnsetType), UNSET))
    return found


# Where a run departs from its preset or method: flags, and options of methods and routers, which are not listed
Settings = defstruct("Settings", _flag_types())


class Dataset(Struct):
    name: Text
    title: Text
    fingerprint: Text
    note: str = ""
    bytes: defstruct("Sizes", [("test", Count)]) | UnsetType = UNSET


class TrainedOn(Struct):
    """The data of the training that a run started from."""

    name: Text
    title: str = ""
    fingerprint: str | None = None


class Metric(Struct):
    name: Text
    lower_is_better: bool
    split: Text
    training: Text | UnsetType = UNSET


class Attack(Struct):
    """The corruption of the input of a further test."""

    kind: Text
    rate: Share


class Model(Struct):
    architecture: Text
    num_experts: Size | None
    router: Text | None = None


class Quality(Struct):
    """The test at one k, None for a dense model; and a finite number under the name of the split."""

    k: Size | None
    flops_per_token: Amount
    active_parameters: Count = 0


class Training(Struct):
    steps: Count
    seconds: Amount
    cpu_seconds: Amount


class Routing(Struct):
    load_entropy: Share
    fluctuation: Share | None
    dead_experts: Share | None = None  # these two are not in older records
    output_similarity: Annotated[float, Meta(ge=-1.001, le=1.001)] | None = None


class Curve(Struct):
    train: list[tuple[Count, float, Size | None, Amount]]  # step, quality or loss, k, lr
    valid: list[tuple[Count, dict[str, float]]]  # step, quality by k


class Environment(Struct):
    device: Text
    precision: Text
    threads: Count
    device_name: str | None = None


class Read(Struct):
    """The data that decided an operation."""

    data: Text
    task: Text | None = None
    fold: Count | UnsetType = UNSET


class Operation(Struct):
    """Surgery or a further training; label: as version 0.1 recorded it."""

    method: Text
    label: Text | UnsetType = UNSET
    origin: Size | UnsetType = field(default=UNSET, name="from")
    keep: Size | UnsetType = UNSET
    options: dict[str, Scalar] = {}
    read: Read | None = None
    steps: Count | UnsetType = UNSET
    checkpoint: Count | UnsetType = UNSET
    pruned_to: Share | UnsetType = UNSET
    taught: bool = False
    settings: Settings = field(default_factory=Settings)


class Measured(Struct):
    experts: list[Size]
    parameters: Count
    quality: Annotated[list[Quality], Meta(min_length=1)]


class Surgery(Struct):
    """Measurements of surgery.py."""

    source_sha256: Text
    tested_on: Text
    metric: Metric
    before: Measured
    after: Measured
    time: Annotated[list[defstruct("Time", [("ratio", Annotated[float, Meta(gt=0)])])], Meta(min_length=1)]
    pruned_to: Share | UnsetType = UNSET


class Pretrained(Struct):
    """The weights that a run started from. folder: their name, where nothing else is known of their training."""

    sha256: Text
    transferred: bool
    operations: list[Operation]
    folder: Text | UnsetType = UNSET
    dataset: TrainedOn | UnsetType = UNSET
    preset: Text | UnsetType = UNSET
    preset_settings: Settings = field(default_factory=Settings)
    method: Text | UnsetType = UNSET
    settings: Settings = field(default_factory=Settings)
    steps: Count | UnsetType = UNSET
    checkpoint: Count | UnsetType = UNSET
    seed: Count | UnsetType = UNSET
    surgery: Surgery | UnsetType = UNSET


class Head(Struct):
    """The part that a record of an unfinished run has too."""

    schema: int
    status: Text


class Complete(Struct):
    """The record of a finished run."""

    schema: Literal[SCHEMA]
    status: Literal[COMPLETE]
    table: Text
    method: Text
    settings: Settings
    sparse: bool
    preset: Text
    preset_settings: Settings
    dataset: Dataset
    metric: Metric
    seed: Count
    model: Model
    parameters: defstruct("Parameters", [("total", Count)])
    quality: Annotated[list[Quality], Meta(min_length=1)]
    training: Training
    curve: Curve
    environment: Environment
    attack: Attack | UnsetType = UNSET
    fold: Count | None = None
    best_step: Count = 0
    routing: Routing | None = None
    pretrained: Pretrained | UnsetType = UNSET
    lost: list[Text] = []
    config_sha256: Text | UnsetType = UNSET


@cache
def measured_on(split: str) -> type[Struct]:
    """The schema of `quality`: every entry has a number for the split."""
    return defstruct("Tested", [("quality", list[defstruct("Entry", [("number", float, field(name=split))])])])


def contradiction(record: dict[str, Any]) -> str | None:
    """The reason why the fields of a record, each valid, cannot belong together; None if they can."""
    start, experts = record.get("pretrained"), record["model"]["num_experts"]
    ks = [entry["k"] for entry in record["quality"]]
    if "training" not in record["metric"]:
        return "'metric' lacks training"
    if record["sparse"] and not experts:
        return "'model.num_experts' must be 1 or more for a sparse method"
    if ks != [None] if not record["sparse"] else None in ks or max(ks) > experts or len({*ks}) < len(ks):
        return f"'quality' must have a row for each k up to {experts}" if record["sparse"] else "'quality' must have one row, with k null"
    if start is None:
        return None
    if "folder" not in start and (lacking := [name for name in ("dataset", "preset", "preset_settings", "steps") if name not in start]):
        return f"'pretrained' lacks {lacking[0]}"
    for one in start["operations"]:
        needed = ("steps", "checkpoint") if one["method"] == "train" else ("from",) if "keep" in one else ()
        if needed and "label" not in one and not one.keys() & {*needed}:
            return f"'pretrained.operations' lacks the {' or '.join(needed)} of {one['method']}"
    if "surgery" in start:
        ks = [entry["k"] for part in ("before", "after") for entry in start["surgery"][part]["quality"]]
        return "'pretrained.surgery' lacks a k or the method" if None in ks or "method" not in start else None
    return None
