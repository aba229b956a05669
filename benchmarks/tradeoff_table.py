"""Records of `python -m benchmarks tradeoff` as tables. Imports no torch."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from benchmarks.tables import Environment, Positive
from utils import documents
from utils.documents import Count
from utils.errors import UserError
from utils.reporting.labels import method_label, preset_label

RECORDS = Path("results/tradeoff")
FIGURE = Path("Figs/tradeoff/quality.png")
REMEDY = "restore it from version control, or measure again"
DENSE, UNIFORM, FLOPS, TIME, MASS = "dense", "uniform", "planned by FLOPs", "planned by time", "threshold"
COSTS = {"flops_per_token": "FLOPs per token", "ratio": "time / dense"}
NOTES = (
    "Every way to choose k of the same trained models. k: of the layers in turn, or their mean number of experts per token; plans of "
    "several seeds are separated by semicolons. Against uniform: difference in quality, planned or threshold less uniform, paired by seed, "
    "mean ± standard deviation. A plan is compared with the uniform k that its budget buys, a threshold with uniform k at equal FLOPs, "
    "between two of them by linear interpolation. Front: no way is both cheaper and better, by FLOPs (F) or by measured time (T). "
    "Plans are made on {calibration:,} positions of the validation split; quality is of {positions:,} positions of the test split."
)


class Planning(Struct):
    k: list[Count]
    unit: str
    budget: Positive
    uniform: Count
    loss: float
    uniform_loss: float


class Row(Struct):
    kind: str
    setting: float
    mean_k: list[Annotated[float, Meta(ge=0)]]
    flops_per_token: Positive
    positions: Count
    seconds: Positive
    ratio: Positive
    plan: Planning | UnsetType = UNSET


class Tradeoff(Struct):
    """The schema of a record."""

    run: dict[str, Any]
    dense: dict[str, Any] | None
    sizes: dict[str, Any]
    rows: Annotated[list[Row], Meta(min_length=1)]
    environment: Environment


class Group:
    """Records of one model trained with several seeds. ways: the rows of all seeds, by kind and setting."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        self.records = sorted(records, key=lambda record: record["run"]["seed"])
        self.run = self.records[0]["run"]
        self.metric = self.run["metric"]["name"]
        self.seeds = [record["run"]["seed"] for record in self.records]
        self.ways: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for record in self.records:
            for row in record["rows"]:
                self.ways.setdefault((row["kind"], row["setting"]), []).append(row)

    @property
    def title(self) -> str:
        """The model and its training."""
        return f"{method_label(self.run)}; {self.run['dataset']['title']}, {preset_label(self.run['preset'], self.run['preset_settings'])}"

    def mean(self, way: tuple[str, float], name: str) -> float:
        """Mean over the seeds."""
        return statistics.mean(row[name] for row in self.ways[way])

    def points(self, kind: str, cost: str) -> list[tuple[float, float, float]]:
        """Setting, cost and quality of the ways of a kind."""
        return [
            (setting, self.mean((one, setting), cost), self.mean((one, setting), self.metric)) for one, setting in self.ways if one == kind
        ]

    def front(self, cost: str) -> list[tuple[str, float]]:
        """The ways that no other is better and cheaper than, from the cheapest on."""
        found, best = [], None
        sign = 1 if self.run["metric"]["lower_is_better"] else -1
        for way in sorted(self.ways, key=lambda way: (self.mean(way, cost), sign * self.mean(way, self.metric))):
            value = sign * self.mean(way, self.metric)
            if best is None or value < best:
                found, best = [*found, way], value
        return found

    def against_uniform(self, way: tuple[str, float]) -> list[float]:
        """By seed, the quality of a way less that of uniform k."""
        found = []
        for record in self.records:
            rows = {(row["kind"], row["setting"]): row for row in record["rows"]}
            if (row := rows.get(way)) is None:
                continue
            uniform = sorted((one for one in record["rows"] if one["kind"] == UNIFORM), key=lambda one: one["flops_per_token"])
            if "plan" in row:
                other = [one[self.metric] for one in uniform if one["setting"] == row["plan"]["uniform"]]
            else:
                other = interpolated([(one["flops_per_token"], one[self.metric]) for one in uniform], row["flops_per_token"])
            found += [row[self.metric] - value for value in other]
        return found


def interpolated(points: list[tuple[float, float]], at: float) -> list[float]:
    """The value at a place between two of the points, which are in order; none beyond them."""
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= at <= high:
            return [below + (above - below) * (at - low) / (high - low)]
    return []


def groups(records: Sequence[dict[str, Any]]) -> list[Group]:
    """Records of one model and preset together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(Group([record]).title, []).append(record)
    return [Group(of_one) for _, of_one in sorted(found.items())]


def load(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder. UserError if there are none, or for a damaged one."""
    found = [documents.read(path, Tradeoff, REMEDY) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} holds no record: run `python -m benchmarks tradeoff RUN... --dense DENSE_RUN...` first")
    return found


def table(group: Group) -> str:
    """A row for each way."""
    seeds = f"{len(group.seeds)} seeds" if len(group.seeds) > 1 else f"one seed ({group.seeds[0]}), spread unknown"
    against_dense = "time / dense" if group.records[0]["dense"] else "time / largest k"
    columns = ["Ways to choose k", "k", "FLOPs per token", against_dense, f"test {group.metric}", "against uniform", "front"]
    lines = [f"**{group.title}: {seeds}.**", "", f"| {' | '.join(columns)} |", f"|:---|{'---:|' * (len(columns) - 1)}"]
    fronts = {letter: group.front(cost) for letter, cost in (("F", "flops_per_token"), ("T", "ratio"))}
    for way, rows in group.ways.items():
        differences = group.against_uniform(way) if way[0] in (FLOPS, TIME, MASS) else []
        cells = [name_of(way), ks_of(rows), f"{group.mean(way, 'flops_per_token') / 1e6:.3f} M", f"{group.mean(way, 'ratio'):.2f}"]
        cells += [f"{group.mean(way, group.metric):.3f}", spread_of(differences)]
        lines.append(f"| {' | '.join([*cells, ' '.join(letter for letter, front in fronts.items() if way in front)])} |")
    return "\n".join(lines)


def name_of(way: tuple[str, float]) -> str:
    """A way in words."""
    kind, setting = way
    if kind == DENSE:
        return "dense, equal parameters"
    of = {UNIFORM: "k = {:g}", FLOPS: "{:.3g} of the experts' FLOPs", TIME: "time of k = {:.3g} E", MASS: "p = {:g}"}[kind]
    return f"{kind}, {of.format(setting)}"


def ks_of(rows: list[dict[str, Any]]) -> str:
    """k of the layers: of each plan, or the mean number of experts."""
    if "plan" in rows[0]:
        return "; ".join(", ".join(map(str, row["plan"]["k"])) for row in rows)
    means = [statistics.mean(values) for values in zip(*(row["mean_k"] for row in rows), strict=True)]
    return ", ".join(f"{mean:.3g}" for mean in means) or "–"


def spread_of(differences: list[float]) -> str:
    """Mean and standard deviation with their sign."""
    if not differences:
        return "–"
    spread = f" ± {statistics.stdev(differences):.3f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.3f}{spread}"


def render(records: Path = RECORDS) -> str:
    """Figure, tables, notes and machine."""
    found = load(records)
    first = found[0]
    positions = max(row["positions"] for row in first["rows"])
    notes = NOTES.format(calibration=first["sizes"]["calibration"], positions=positions)
    clock = "CPU time of one thread" if first["sizes"]["clock"] == "thread_time" else "wall-clock time"
    env = first["environment"]
    machines = f"Times: medians of {first['sizes']['rounds']} interleaved rounds, {clock}, {env['device_name']}, torch {env['torch']}."
    commits = ", ".join(sorted({record["environment"]["commit"][:9] for record in found}))
    picture = f"![Quality against FLOPs and measured time: uniform k, planned, thresholds, dense, and the front](../../{FIGURE})"
    return "\n\n".join([picture, *map(table, groups(found)), f"{notes}\n{machines} Code: commit {commits}."])
