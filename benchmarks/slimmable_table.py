"""Records of `python -m benchmarks slimmable` as tables. Imports no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from benchmarks.tables import Environment, Positive
from utils import documents
from utils.documents import Count, Sha256
from utils.errors import UserError

RECORDS = Path("results/slimmable")
FIGURES = Path("Figs/slimmable")
REMEDY = "restore it from version control, or measure again"
DENSE, OTHER = "dense", "dense, other size"
COSTS = {"ratio": "time of generation / dense", "weights": "FLOPs / dense"}
NOTES = (
    "Perplexity per token on text that neither calibration nor training has seen, in parentheses over that of the dense model. Time: of "
    "generating one token after another with a cache by transformers' own loop, over the dense model's in the same round. Bound: weights "
    "read for a token, over the dense model's; FLOPs have the same ratio. Error: of the outputs against the dense model's, in norms."
)


class Model(Struct):
    name: str
    package: str
    sha256: Sha256
    origin: dict[str, str] | None = None


class Text(Struct):
    name: str
    tokens: Count
    bytes: Count
    context: Count
    sha256: Sha256
    bos: bool


class Row(Struct):
    stage: str
    sha256: Sha256
    weights: Count
    experts: Count
    k: Count | None
    commit: str | None
    name: str | UnsetType = UNSET
    error: Annotated[float, Meta(ge=0)] | UnsetType = UNSET
    perplexity: Positive | UnsetType = UNSET
    bits_per_byte: Positive | UnsetType = UNSET
    seconds: Positive | UnsetType = UNSET
    ratio: Positive | UnsetType = UNSET


class Trial(Struct):
    """A way to convert the model. options: of the conversion. calibration: sha256 of its text. tokens, measured: of it, and of the held-out
    text. perplexity: by k, as text; recovered: after training on recovery_tokens, at a commit of its own.
    """

    calibration: Sha256
    tokens: Count
    measured: Count
    options: dict[str, Any]
    seconds: Positive
    perplexity: dict[str, Positive]
    commit: str | None
    recovered: dict[str, Positive] | UnsetType = UNSET
    recovery_tokens: Count | UnsetType = UNSET
    recovery_commit: str | UnsetType | None = UNSET


class Slimmable(Struct):
    """The schema of a record."""

    model: Model
    text: Text
    timing: dict[str, Any]
    rows: list[Row]
    ablation: list[Trial]
    environment: Environment


def load(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The records of a folder. UserError if there are none, or for a damaged one."""
    found = [documents.read(path, Slimmable, REMEDY) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} holds no record: run `python -m benchmarks slimmable STAGE=FOLDER... --dense FOLDER --text FILE` first")
    return found


def dense_row(record: dict[str, Any]) -> dict[str, Any]:
    """The row of the dense model."""
    return next(row for row in record["rows"] if row["stage"] == DENSE)


def stages(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the converted models by stage, from the largest k on."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["stage"] not in (DENSE, OTHER):
            found.setdefault(row["stage"], []).append(row)
    return {stage: sorted(rows, key=lambda row: -row["k"]) for stage, rows in found.items()}


def others(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of dense models of other sizes."""
    return [row for row in record["rows"] if row["stage"] == OTHER]


def perplexity(row: dict[str, Any], record: dict[str, Any]) -> float:
    """Perplexity of a row per token of the dense model's tokenizer, also where the row is of a model with another one."""
    if row["stage"] != OTHER:
        return row["perplexity"]
    return math.exp(row["bits_per_byte"] * math.log(2) * record["text"]["bytes"] / record["text"]["tokens"])


def number(value: float | None) -> str:
    """Two decimals, or none for a large number."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(columns), "|:---|" + "---:|" * (len(columns) - 1)]


def quality_table(record: dict[str, Any]) -> str:
    """A row for each k, with the perplexity of every stage, and time and bound of the last stage."""
    dense, by_stage = dense_row(record), stages(record)
    ks = sorted({row["k"] for rows in by_stage.values() for row in rows}, reverse=True)
    causal, generated = "perplexity" in dense, record["timing"]["generated"]
    last = [*by_stage][-1] if by_stage else None
    quality = "perplexity" if causal else "error"
    lines = head(["k", *(f"{stage}: {quality}" for stage in by_stage), "time / dense", "bound", "tokens/s" if causal else "passes/s"])

    def speed(row: dict[str, Any]) -> str:
        return f"{(generated if causal else 1) / row['seconds']:.1f}" if "seconds" in row else "–"

    def relative(row: dict[str, Any]) -> str:
        return f"{row['ratio']:.2f}" if "ratio" in row else "–"

    lines.append(line([DENSE, *(number(dense[quality]) if causal else "–" for _ in by_stage), relative(dense), "1.00", speed(dense)]))
    for k in ks:
        rows = {stage: next((row for row in found if row["k"] == k), {}) for stage, found in by_stage.items()}
        cells = [shown(row, dense, quality) for row in rows.values()]
        own = rows[last]
        bound = f"{own['weights'] / dense['weights']:.2f}" if own else "–"
        lines.append(line([str(k), *cells, relative(own), bound, speed(own)]))
    for row in others(record):
        own = {**row, quality: perplexity(row, record)} if causal else row
        cells = [shown(own, dense, quality)] * len(by_stage)
        lines.append(line([f"dense {row['name']}", *cells, relative(row), f"{row['weights'] / dense['weights']:.2f}", speed(row)]))
    return "\n".join(lines)


def shown(row: dict[str, Any], dense: dict[str, Any], quality: str) -> str:
    """Perplexity with its ratio to the dense model's, or an error."""
    if quality not in row:
        return "–"
    return f"{row[quality]:.1e}" if quality == "error" else f"{number(row[quality])} (× {number(row[quality] / dense[quality])})"


def ablation_table(record: dict[str, Any]) -> str:
    """A row for each way to convert the model."""
    trials = record["ablation"]
    names = list(dict.fromkeys(name for trial in trials for name in trial["options"]))
    ks = sorted({int(k) for trial in trials for k in trial["perplexity"]}, reverse=True)
    trained = [f"k = {k}, trained" for k in ks] if any("recovered" in trial for trial in trials) else []
    lines = head([*(name.replace("_", " ") for name in names), *(f"k = {k}" for k in ks), *trained, "seconds"])
    for trial in trials:
        cells = [str(trial["options"].get(name, "–")) for name in names]
        cells += [number(trial["perplexity"].get(str(k))) for k in ks]
        cells += [number(trial.get("recovered", {}).get(str(k))) for k in ks if trained]
        lines.append(line([*cells, f"{trial['seconds']:.0f}"]))
    return "\n".join(lines)


def exactness(record: dict[str, Any]) -> str:
    """Error of each stage with all experts active, in a sentence."""
    found = [f"{stage} {row['error']:.1e}" for stage, rows in stages(record).items() for row in rows if row["k"] == row["experts"]]
    return f"Error at k = E: {', '.join(found)}."


def section(record: dict[str, Any]) -> str:
    """Everything of one model."""
    model, text, env, timing = (record[name] for name in ("model", "text", "environment", "timing"))
    causal = "perplexity" in dense_row(record)
    parts = [f"## {model['name']}"]
    if causal and stages(record):
        parts.append(f"![Quality of {model['name']} against time and FLOPs](../../{FIGURES}/{model['name']}.png)")
    parts += [quality_table(record), exactness(record)]
    if record["ablation"]:
        trial = record["ablation"][0]
        of = f"the same {trial['tokens']:,} calibration tokens; perplexity on {trial['measured']:,} held-out tokens without any training"
        trained = {one["recovery_tokens"] for one in record["ablation"] if "recovery_tokens" in one}
        then = f", and after training on the same {', '.join(f'{tokens:,}' for tokens in sorted(trained))} tokens" if trained else ""
        parts += [f"Ways to convert it, all with {of}{then}:", ablation_table(record)]
    origin = f", {model['origin']['name']} (sha256 {model['origin']['sha256'][:12]})" if model.get("origin") else ""
    weights = f"Weights: {model['package']}{origin}, dense folder sha256 {model['sha256'][:12]}."
    read = f"Text: {text['tokens']:,} tokens ({text['bytes']:,} bytes, sha256 {text['sha256'][:12]}) in sequences of {text['context']}."
    clock = "CPU time of one thread" if timing["clock"] == "thread_time" else "wall-clock time"
    machine = f"Times: medians of {timing['rounds']} interleaved rounds, {clock}, {env['device_name']}, torch {env['torch']}."
    made = [row.get(name) for row in (*record["rows"], *record["ablation"]) for name in ("commit", "recovery_commit")]
    commits = sorted({commit[:9] for commit in made if commit})
    return "\n\n".join([*parts, f"{weights} {read} {machine} Code: commit {', '.join(commits) or 'unknown'}."])


def render(records: Path = RECORDS) -> str:
    """Notes, and a section for each model."""
    return "\n\n".join([NOTES, *map(section, load(records))])
