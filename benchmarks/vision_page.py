"""Page, table and figure of the records of `python -m benchmarks.vision`. Imports matplotlib.

python -m benchmarks.vision_page                  # results/vision/page.md and its figure, from the records there
python -m benchmarks.vision_page RUNS             # the same of the finished runs in a folder, into it
python -m benchmarks.vision_page RUNS --collect   # copies the records of these runs into results/vision first
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from matplotlib import pyplot as plt
from msgspec import Meta, Struct

from benchmarks.slimmable_table import head, line
from benchmarks.tables import Environment, Positive
from utils import documents
from utils.documents import Count
from utils.errors import Parser, UserError, run_main
from utils.reporting.figures import COLOURS, DENSE_MARKERS, GREYS, MARKERS, STYLE, save
from utils.reporting.groups import mean_and_spread
from utils.reporting.labels import method_title, phrases, slug
from utils.reporting.pages import update_page, writing
from utils.reporting.tables import DASH

RECORDS = Path("results/vision")
FIGURES = Path("Figs/vision")
REMEDY = "restore it from version control, or run it again"
KINDS = {"clean": "clean", "corrupted": "corrupted (mean)"}
SHARES = {"E/2": 2, "E": 1}
RATE = 1e-3  # learning rate that rows do not name
BELOW = 12  # percentage points below the best row that the axes of the figure show
Percent = Annotated[float, Meta(ge=0, le=100)]
Records = list[dict[str, Any]]


class Row(Struct):
    k: Count | None
    train: Percent
    clean: Percent
    corrupted: Annotated[dict[str, Annotated[list[Percent], Meta(min_length=1)]], Meta(min_length=1)]


class Vision(Struct):
    """The schema of a record."""

    method: str
    router: str | None
    output_scale: str
    options: dict[str, Any]
    seed: int
    data: dict[str, Any]
    model: dict[str, Any]
    experts: dict[str, Any] | None
    training: dict[str, Any]
    seconds: Positive
    parameters: dict[str, Count]
    rows: Annotated[list[Row], Meta(min_length=1)]
    environment: Environment


def label(record: dict[str, Any]) -> str:
    """The row of a run in words."""
    named = {"gate_name": record["router"]} if record["router"] else {}
    scaled = {"output_scale": "dense"} if record["output_scale"] == "dense" else {}
    rate = {"learning_rate": record["training"]["lr"]} if record["training"]["lr"] != RATE else {}
    title = method_title(record["method"]).replace(" (learned router)", "")
    return ", ".join([title, *phrases(named | scaled | record["options"] | rate)])


def place(record: dict[str, Any]) -> Path:
    """The path of a record in results/."""
    parts = [record["data"]["name"], record["method"], record["router"], "times-e" * (record["output_scale"] == "dense")]
    parts += [f"{name}-{value}" for name, value in record["options"].items()]
    parts.append(f"lr-{record['training']['lr']:g}" * (record["training"]["lr"] != RATE))
    return RECORDS / f"{slug('-'.join(filter(None, parts)))}-seed{record['seed']}.json"


def load(paths: Iterable[Path]) -> dict[str, Records]:
    """The records of each row by seed, dense models first. UserError if there are none, and for such as cannot be compared."""
    rows: dict[str, Records] = {}
    found = [(path, documents.read(path, Vision, REMEDY)) for path in sorted(paths)]
    if not found:
        raise UserError("there is no record of a finished run: bash script/vision/digits.sh makes them")
    first_path, first = found[0]
    for path, record in found:
        if other := [name for name, value in shared(record).items() if value != shared(first)[name]]:
            raise UserError(f"{path} has other {other[0]} than {first_path}: keep runs that cannot be compared in folders of their own")
        several = rows.setdefault(label(record), [])
        if record["seed"] in [one["seed"] for one in several]:
            raise UserError(f"{path} is seed {record['seed']} of '{label(record)}', which is there already: remove one")
        several.append(record)
    return dict(sorted(rows.items(), key=lambda row: (row[1][0]["experts"] is not None, -last(row[1]))))


def shared(record: dict[str, Any]) -> dict[str, Any]:
    """Settings in which runs that are compared agree."""
    training = {name: value for name, value in record["training"].items() if name not in ("lr", "schedule")}
    return {"data": record["data"], "model": record["model"], "training": training}


def last(records: Records) -> float:
    """Mean accuracy on corrupted images at k = E, or of a dense model."""
    return statistics.mean(at(records, experts_of(records), "corrupted"))


def experts_of(records: Records) -> int | None:
    """E; None for a dense model."""
    return records[0]["experts"]["num_experts"] if records[0]["experts"] else None


def at(records: Records, k: float | None, kind: str) -> list[float]:
    """Accuracy of each seed at k, on clean images, or the mean over corruptions and severities."""
    rows = [row for record in records for row in record["rows"] if row["k"] == k]
    if kind == "corrupted":
        return [statistics.mean(value for values in row["corrupted"].values() for value in values) for row in rows]
    return [row[kind] for row in rows]


def table(rows: dict[str, Records]) -> str:
    """A row for each method."""
    lines = head(["", "parameters", *(f"{kind}, k = {share}" for kind in KINDS for share in SHARES), "training, s"])
    most = max(map(len, rows.values()))
    for name, records in rows.items():
        E = experts_of(records)
        cells = [name + f" (n = {len(records)})" * (len(records) < most), f"{records[0]['parameters']['total']:,}"]
        for kind in KINDS:
            for share in SHARES.values():
                values = at(records, E / share if E else None, kind) if E or share == 1 else []
                mean, spread = mean_and_spread(values) if values else (None, 0)
                cells.append(DASH if mean is None else f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}")
        lines.append(line([*cells, f"{statistics.median(record['seconds'] for record in records):.0f}"]))
    return "\n".join(lines)


def render(rows: dict[str, Records], picture: str | None = None) -> str:
    """Figure, table, notes and provenance. picture: path of the figure; default: the one in Figs/."""
    records = [record for several in rows.values() for record in several]
    first, seeds = records[0], sorted({record["seed"] for record in records})
    shown_seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    data, model, training = first["data"], first["model"], first["training"]
    named = ", ".join(f"{name} {' / '.join(f'{value:g}' for value in values)}" for name, values in data["corruptions"].items())
    notes = [
        f"Accuracy in percent on {data['test']:,} test images of {data['name']} after the last step, none of which training or a choice of "
        f"weights has seen; mean ± standard deviation over {shown_seeds}, all with the same split. "
        f"Corrupted: mean over {named}. ViT of {model['layers']} layers, width {model['width']}, {model['hidden']} hidden units in "
        f"each feed-forward network, patches of {model['patch_size']} x {model['patch_size']} of {model['image_size']} x "
        f"{model['image_size']}, trained on {data['train']:,} images: {training['steps']:,} steps of {training['batch']}, learning rate "
        f"{RATE:g} unless a row says another, no augmentation.",
    ]
    machines = sorted({f"{record['environment']['device_name']}, torch {record['environment']['torch']}" for record in records})
    commits = sorted({str(record["environment"]["commit"])[:9] for record in records})
    notes.append(f"Images: sha256 {data['sha256'][:12]}. {'; '.join(machines)}. Code: commit {', '.join(commits)}.")
    shown = f"![Accuracy against k on clean and corrupted images]({picture or f'../../{figure_of(rows)}'})"
    return "\n\n".join([shown, table(rows), *notes])


def figure_of(rows: dict[str, Records]) -> Path:
    """The figure of the committed records."""
    return FIGURES / f"{slug(next(iter(rows.values()))[0]['data']['name'])}.png"


def draw(rows: dict[str, Records], path: Path) -> None:
    """Accuracy against k, a panel for clean images and one for corrupted ones; dense models are levels, bars standard deviations."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(KINDS), figsize=(11.5, 5.0), layout="constrained")
        for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
            best, dense, sparse = 0.0, 0, 0
            for name, records in rows.items():
                if experts_of(records) is None:
                    level = statistics.mean(at(records, None, kind))
                    look = {"color": GREYS[dense % len(GREYS)], "linestyle": (":", "--")[dense % 2]}
                    ax.axhline(level, linewidth=1.4, label=name, marker=DENSE_MARKERS[dense % len(DENSE_MARKERS)], **look)
                    best, dense = max(best, level), dense + 1
                    continue
                ks = sorted({row["k"] for record in records for row in record["rows"]})
                means, spreads = zip(*(mean_and_spread(at(records, k, kind)) for k in ks), strict=True)
                look = {"color": COLOURS[sparse % len(COLOURS)], "marker": MARKERS[sparse % len(MARKERS)], "markersize": 5}
                look["linestyle"] = "--" if records[0]["output_scale"] == "dense" else "-"
                ax.errorbar(ks, means, spreads if any(spreads) else None, label=name, capsize=2, elinewidth=0.8, linewidth=1.4, **look)
                best, sparse = max(best, *means), sparse + 1
            ax.set(title=title, xlabel="active experts k", ylim=(best - BELOW, best + 1))
        axes[0].set_ylabel("accuracy in percent")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        save(figure, path)


def collect(runs: list[Path]) -> None:
    """Copies records into results/. UserError, before anything is written, if there are others under their names."""
    planned = {place(record): record for records in (load(runs) if runs else {}).values() for record in records}
    for target, record in planned.items():
        if target.exists() and documents.read(target, Vision, REMEDY) != record:
            raise UserError(f"{target} holds another run: remove it first")
    for target, record in planned.items():
        with writing(target) as file:
            documents.write(file, record)


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = Parser(prog="python -m benchmarks.vision_page", description="Page, table and figure of vision runs.")
    parser.add_argument("runs", type=Path, nargs="?", help="folder with a folder for each run")
    parser.add_argument("--collect", action="store_true", help="copy the records into results/vision, and render the page there")
    args = parser.parse_args(argv)
    runs = sorted(args.runs.glob("*/result.json")) if args.runs else []
    if args.collect or not args.runs:
        collect(runs)
        rows = load(RECORDS.glob("*.json"))
        update_page(RECORDS / "page.md", "vision", render(rows))
        picture = figure_of(rows)
    else:
        rows, picture = load(runs), args.runs / "accuracy.png"
        text = render(rows, picture.name)
        with writing(args.runs / "page.md") as file:
            documents.replace(file, f"{text}\n".encode())
        print(text)
    with writing(picture) as file:
        draw(rows, file)


if __name__ == "__main__":
    run_main(main)
