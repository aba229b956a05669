"""Scores of a model fine-tuned whole and with experts, at each k: tables of the runs of script/slimmable/finetune.sh. Imports no torch.

python -m benchmarks.slimmable_tasks runs/slimmable/minilm            # of the finished runs in a folder
python -m benchmarks.slimmable_tasks runs/slimmable/minilm --collect  # copies their records into results/slimmable/minilm
"""

import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.slimmable_table import DENSE, FIGURES, RECORDS, REMEDY, head, line, load
from smoe_dropout.config import SMoEConfig
from utils import documents
from utils.data.rows import TASKS, kind_of
from utils.errors import Parser, UserError, run_main
from utils.reporting import records
from utils.reporting.groups import Row, frozen, gather
from utils.reporting.labels import Record, method_title, phrases
from utils.reporting.pages import writing
from utils.reporting.tables import DASH, differences

BAR = 1.5  # points that half the experts may lose
SHARES = (1, 2, 4, 8, 16)
CONVERSION = "conversion"
TRAININGS = {"smoe_dropout": "growing", "elastic": "elastic", "smoe": "learned"}  # in the names of rows, by method
ROWS = (  # of the script
    *(DENSE, "fitted-elastic", "contiguous-elastic", "contiguous-growing", "fitted-growing"),
    *("fitted-learned", "contiguous-learned", "copies-learned"),
)
NOTES = (
    "Score in percent with k of E experts, after the last step; mean, and each seed in parentheses. Half - dense: score with half the "
    "experts less that of the dense model with the same seeds. FLOPs: of a pass with half the experts, over the dense model's."
)


def label(record: Record) -> str:
    """The experts and the training of a run in words."""
    start, method = record["pretrained"], method_title(record["method"]).replace(" (learned router)", "")
    if "experts" not in start:
        return DENSE
    experts = SMoEConfig.from_dict(asdict(SMoEConfig()) | start["experts"])
    made = f"{experts.num_experts} copies" if experts.expert_init == "copy" else f"{experts.cut} cut"
    shared = f", {experts.shared_experts} shared" if experts.shared_experts else ""
    router = "random" if experts.router == "random" else "fitted" if experts.freeze_router else "trained"
    told = {name: value for name, value in record["settings"].items() if name in ("moe_top_k", "moe_top_k_min")}
    return f"{made}{shared}, {router} router; {', '.join([method, *phrases(told, experts.num_experts)])}"


def name_of(record: Record) -> str:
    """The name of a run's row in the script."""
    start, training = record["pretrained"], TRAININGS.get(record["method"], record["method"])
    return f"{start['folder'].removesuffix(f'-{training}')}-{training}" if "experts" in start else DENSE


def place(record: Record) -> Path:
    """The path of a record in the folder of its model."""
    return Path(f"{record['dataset']['name']}-{name_of(record)}-seed{record['seed']}.json")


def collect(runs: Path) -> list[Path]:
    """Copies the records of the finished runs in a folder, and those of the conversions they started from, into results/."""
    target = RECORDS / runs.name
    found = records.collect([path.parent for path in runs.glob("*/*/result.json")], lambda record: target / place(record))
    for path in sorted(runs.glob(f"models/*/{CONVERSION}.json")):
        found.append(target / f"{CONVERSION}-{path.parent.name}.json")
        with writing(found[-1]) as file:
            documents.write(file, documents.read(path, dict, REMEDY))
    return found


def rows_of(paths: Iterable[Path]) -> dict[str, list[Row]]:
    """The rows of each task, in the order of TASKS; of a task, the dense model first, then the best with half the experts. UserError for
    weights of several dense models.
    """
    found = records.load_records(paths)
    weights = {record["pretrained"]["sha256"] for _, record in found if "experts" not in record["pretrained"]}
    if len(weights) > 1:
        raise UserError("the records are of several dense models: give the folder of one")
    keys = ("method", "settings", "preset_settings")

    def row_of(record: Record) -> str:
        return frozen([record["pretrained"].get("experts"), *(record[name] for name in keys)])

    groups = gather(found, lambda record: [*TASKS].index(record["dataset"]["name"]), row_of, label)
    return {rows[0].first["dataset"]["name"]: sorted(rows, key=lambda row: (row.sparse, -(mean(scores(row, 2)) or 0))) for rows in groups}


def scores(row: Row, share: int) -> list[float]:
    """The score of each seed with E / share experts; a dense model has only the first."""
    return [entry[record["metric"]["split"]] for record, entry in entries(row, share)]


def entries(row: Row, share: int) -> list[tuple[Record, dict[str, Any]]]:
    """Each record with its test at E / share experts, if there is one."""
    k = row.experts / share if row.sparse else None if share == 1 else 0
    return [(record, entry) for record in row.records for entry in record["quality"] if entry["k"] == k]


def mean(values: list[float]) -> float | None:
    """The mean, None of nothing."""
    return statistics.mean(values) if values else None


def lost(row: Row, dense: Row | None) -> float | None:
    """Score with half the experts less that of the dense model, mean over the seeds that both have."""
    return mean(differences(row, "E/2", dense, "E")) if dense else None


def cost(row: Row, dense: Row | None) -> float | None:
    """FLOPs with half the experts, or of the dense model, over those of the dense model."""
    found, whole = ([entry["flops_per_token"] for _, entry in entries(one, 1 + one.sparse)] if one else [] for one in (row, dense))
    return mean(found) / mean(whole) if found and whole else None


def table(rows: list[Row]) -> str:
    """A row for each conversion and training."""
    dense = dense_of(rows)

    def cell(values: list[float]) -> str:
        each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
        return f"{mean(values):.1f}{each}" if values else DASH

    lines = head(["row", "experts; training", *("E" if share == 1 else f"E/{share}" for share in SHARES), "half - dense", "FLOPs"])
    for row in rows:
        less, flops = lost(row, dense), cost(row, dense)
        cells = [cell(scores(row, share)) for share in SHARES]
        cells += [DASH if less is None else f"{less:+.1f}", DASH if flops is None else f"{flops:.2f}"]
        lines.append(line([name_of(row.first), row.label, *cells]))
    return "\n".join(lines)


def dense_of(rows: list[Row]) -> Row | None:
    """The row of the dense model."""
    return next((row for row in rows if not row.sparse), None)


def verdict(rows: list[Row]) -> str:
    """Sentence on the rows, cheaper than the dense model, in which half the experts come within the bar of it with all seeds."""
    dense, seeds = dense_of(rows), max(len(row.records) for row in rows)
    found = {row.label: row for row in rows if row.sparse and lost(row, dense) is not None and cost(row, dense) < 1}

    def told(row: Row) -> str:
        return f"{name_of(row.first)} ({lost(row, dense):+.1f}{f', n = {len(row.records)}' * (len(row.records) < seeds)})"

    within = [label for label, row in found.items() if len(row.records) == seeds and lost(row, dense) >= -BAR]
    met = ", ".join(told(found[label]) for label in within) or "none"
    others = ", ".join(told(row) for label, row in found.items() if label not in within)
    rest = f" Others: {others}." if others else ""
    return f"Cheaper rows with half the experts within {BAR} points of the dense model, with all seeds (n = {seeds}): {met}.{rest}"


def missing(tasks: dict[str, list[Row]]) -> str:
    """Runs that are not there, in a sentence; empty if none are."""
    parts = []
    for task, rows in tasks.items():
        seeds = {name_of(row.first): {record["seed"] for record in row.records} for row in rows}
        wanted = ROWS if len(rows) > 3 else [*seeds]  # of some tasks, the best rows only
        for seed in sorted(set().union(*seeds.values())):
            if names := [name for name in wanted if seed not in seeds.get(name, ())]:
                parts.append(f"{kind_of(task).title}, seed {seed}: {', '.join(names)}")
    if absent := [kind_of(task).title for task in TASKS if task not in tasks]:
        parts.append(f"tasks {', '.join(absent)}")
    return f"Not run: {'; '.join(parts)}." if parts else ""


def paths_of(folder: Path) -> list[Path]:
    """The records of runs in a folder of results/."""
    return [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(CONVERSION)]


def section(tasks: dict[str, list[Row]]) -> str:
    """The tables of all tasks, what they say of half the experts, and what is missing."""
    parts = [NOTES]
    for task, rows in tasks.items():
        first = rows[0].first
        folds = f", fold {first['fold']}" if first.get("fold") is not None else ""
        shown = f"{first['metric']['name']} on {first['metric']['split']}{folds}, {first['training']['steps']:,} steps"
        parts += [f"#### {kind_of(task).title}: {shown}", table(rows), verdict(rows)]
    return "\n\n".join(filter(None, [*parts, missing(tasks)]))


def provenance(model: dict[str, Any], tasks: dict[str, list[Row]], folder: Path) -> str:
    """Weights, text and code of the committed records. UserError for a conversion of other weights than the dense model's."""
    found = [record for rows in tasks.values() for row in rows for record in row.records]
    conversions = [documents.read(path, dict, REMEDY) for path in sorted(folder.glob(f"{CONVERSION}-*.json"))]
    whole = {record["pretrained"]["sha256"] for record in found if "experts" not in record["pretrained"]}
    if other := (whole | {sha for one in conversions for sha in one["weights_sha256"].values()}) - {model["sha256"]}:
        raise UserError(f"{folder} has runs of other weights, {other.pop()[:12]}, than {folder}.json: {REMEDY}")
    texts = ", ".join(sorted({one["data_sha256"][:12] for one in conversions}))
    commits = ", ".join(sorted({record["environment"]["commit"][:9] for record in found if record["environment"].get("commit")}))
    weights = f"Weights: {model['package']}, dense folder sha256 {model['sha256'][:12]}; calibration text sha256 {texts}."
    return f"{weights} bf16, one thread, batches of 32. Code: commit {commits}."


def figure_of(name: str) -> Path:
    """The figure of a model."""
    return FIGURES / f"{name}_tasks.png"


def render(folder: Path = RECORDS) -> str:
    """A section for each model that has records."""
    parts = []
    for record in load(folder):
        model = record["model"]
        if paths := paths_of(folder / model["name"]):
            tasks = rows_of(paths)
            picture = f"![Scores of {model['name']} with k of E experts](../../{figure_of(model['name'])})"
            parts += [f"### {model['name']}", picture, section(tasks), provenance(model, tasks, folder / model["name"])]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = Parser(prog="python -m benchmarks.slimmable_tasks", description="Tables of the runs of script/slimmable/finetune.sh.")
    parser.add_argument("runs", type=Path, help="OUT of the script")
    parser.add_argument("--collect", action="store_true", help="copy the records into results/slimmable, into a folder named as OUT")
    args = parser.parse_args(argv)
    finished = sorted(args.runs.glob("*/*/result.json"))
    if not finished:
        raise UserError(f"{args.runs} holds no finished run: run script/slimmable/finetune.sh first")
    if args.collect:
        for path in collect(args.runs):
            print(f"collected {path}", file=sys.stderr)
    print(section(rows_of(finished)))


if __name__ == "__main__":
    run_main(main)
