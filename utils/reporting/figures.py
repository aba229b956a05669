"""Figures of finished runs: quality against parameters and k, training curves. Imports matplotlib; tables do without."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from smoe_dropout.registry import METHODS, load
from utils.reporting import surgery_table
from utils.reporting.ablations import Ablation
from utils.reporting.groups import Group, Row, mean_and_spread, quality_points
from utils.reporting.labels import phrases

DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart, then Tol's muted one for what does not fit in; dense models take
# black and greys, yellow is too pale for lines.
COLOURS = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933"),
    *("#332288", "#117733", "#AA4499", "#661100", "#44BB99"),
)
CROWD = 8  # rows beyond which the legend takes a column of its own, and k is written at one of them only
GREYS = ("#000000", "#666666", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE_MARKERS = ("*", "p", "h", "d", "8")
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def styles(rows: list[Row]) -> dict[str, dict]:
    """Colour and marker of each row by label. Colours repeat only when all are taken, and then with another marker.

    A registered sparse method has the same ones in every figure, whichever others are drawn; its variants take what is left.
    """
    registered = [name for name in METHODS if load(METHODS, "method", name).sparse]
    left = [*range(len(registered), len(COLOURS)), *range(len(registered))]
    order: dict[str, int] = {}
    for row in sorted((row for row in rows if row.sparse), key=lambda row: bool(row.records and row.records[0]["settings"])):
        own = registered.index(row.method) if row.method in registered else None
        taken = order.values()
        free = itertools.chain(left, itertools.count(len(COLOURS)))
        order[row.label] = own if own is not None and own not in taken else next(i for i in free if i not in taken)
    look = {label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for label, i in order.items()}
    for i, row in enumerate(row for row in rows if not row.sparse):
        look[row.label] = {"color": GREYS[i % len(GREYS)], "marker": DENSE_MARKERS[i % len(DENSE_MARKERS)]}
    return look


def curve_points(row: Row, kind: str) -> list[tuple[int, float, float]]:
    """(step, mean, standard deviation) of the training loss (`kind` train) or of validation at k = E (valid), at steps every seed has."""
    by_step: dict[int, list[float]] = {}
    for record in row.records:
        key = str(record["model"]["num_experts"]) if record["sparse"] else "dense"
        for line in record["curve"][kind]:
            value = line[1] if kind == "train" else line[1].get(key)
            if value is not None:
                by_step.setdefault(line[0], []).append(value)
    whole = {step: values for step, values in by_step.items() if len(values) == len(row.records)}
    return [(step, *mean_and_spread(values)) for step, values in sorted(whole.items())]


@contextmanager
def chart(path: Path, columns: int, size: tuple[float, float], rows: int = 1, **kwargs) -> Iterator[tuple[Figure, list]]:
    """A styled figure and its axes, row by row; saved at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs)
        yield figure, axes
        save(figure, path)


def _millions(value: float, _=None) -> str:
    return f"{value / 1e6:.3g}"


def _parameter_axis(ax, points: list[tuple]) -> None:
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    ax.set_xlabel("activated parameters per token (millions)")
    if high > 3 * low:  # k doubles from point to point: a log axis sets the points evenly
        ax.set_xscale("log")
        ax.set_xlim(low * (low / high) ** 0.06, high * (high / low) ** 0.1)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    else:
        width = (high - low) or 0.5 * high
        ax.set_xlim(low - 0.06 * width, high + 0.1 * width)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(_millions))


def _label_k(ax, drawn: dict[str, list[tuple]], look: dict[str, dict], falling: bool) -> None:
    """Writes k at the markers, on the side the curve leaves free; methods that share a place get one label, at the highest of them."""
    places: dict[tuple, list[tuple]] = {}
    sparse = {title: points for title, points in drawn.items() if points[0][0] is not None}
    if len(sparse) > CROWD:
        highest = max(sparse, key=lambda title: statistics.mean(point[2] for point in sparse[title]))
        sparse = {highest: sparse[highest]}
    for title, points in sparse.items():
        for k, x, y, _ in points:
            if k is not None:
                places.setdefault((k, round(math.log(x) * 50)), []).append((y, x, title))
    for (k, _), marks in places.items():
        y, x, title = max(marks)
        shift, side = ((5, 4), "left") if falling else ((-5, 4), "right")
        text = ax.annotate(f"k={k}", (x, y), shift, textcoords="offset points", ha=side, fontsize=8, color=look[title]["color"])
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def draw_quality(ax, drawn: dict[str, list[tuple]], look: dict[str, dict], falling: bool) -> None:
    for title, points in drawn.items():
        _, xs, ys, spreads = zip(*points, strict=True)
        dense = points[0][0] is None
        if dense:
            ax.axhline(ys[0], color=look[title]["color"], linewidth=0.8, linestyle=":", zorder=1)
        star = dense and look[title]["marker"] == "*"
        lines = {"linestyle": "none" if dense else "-", "linewidth": 1.6, "capsize": 3, "elinewidth": 1, "zorder": 4 if dense else 3}
        marks = {**look[title], "markersize": 13 if star else 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
        ax.errorbar(xs, ys, yerr=spreads if any(spreads) else None, label=title, **lines, **marks)
    _label_k(ax, drawn, look, falling)
    _parameter_axis(ax, [point for points in drawn.values() for point in points])
    ax.margins(y=0.12)


def _worth_zooming(drawn: dict[str, list[tuple]], upper: dict[str, list[tuple]]) -> bool:
    """Whether small k, of poor quality, would press the trained range of k into a sliver of the figure."""
    whole, part = ([p[2] for points in d.values() for p in points] for d in (drawn, upper))
    return len(part) > 1 and max(whole) - min(whole) > 2.5 * (max(part) - min(part))


def draw_slimmable(group: Group, path: Path) -> None:
    """Test quality against activated parameters, one curve a sparse row; a second panel shows k >= E/2 where small k dwarfs it."""
    look = styles(group.rows)
    drawn = {row.label: quality_points(row) for row in group.rows}
    crowd = len(drawn) > CROWD
    half = {row.label: (row.experts or 0) // 2 for row in group.rows}
    upper = {label: kept for label, points in drawn.items() if (kept := [p for p in points if p[0] is None or p[0] >= half[label]])}
    zoom = _worth_zooming(drawn, upper)
    with chart(path, 2 if zoom else 1, ((9.2 if zoom else 6.6) + 3 * crowd, 4.3 + 0.7 * crowd)) as (figure, axes):
        for ax, part in zip(axes[0], (drawn, upper), strict=False):
            draw_quality(ax, part, look, group.metric["lower_is_better"])
        axes[0][0].set_ylabel(quality_label(group))
        if zoom:
            axes[0][0].set_title("all k", fontsize=10)
            axes[0][1].set_title("k ≥ E/2", fontsize=10)
        handles, labels = axes[0][0].get_legend_handles_labels()
        columns = 1 if crowd else len(labels) if len(labels) < 5 else math.ceil(len(labels) / 2)
        figure.legend(handles, labels, loc="outside right center" if crowd else "outside lower center", ncols=columns)
        add_title(figure, group)


def draw_by_k(group: Group, path: Path) -> None:
    """Quality against k after fine-tuning, dense models as lines; dashed where training started from random weights."""
    with chart(path, 1, (6.6, 4.3)) as (figure, ((ax,),)):
        _by_k(ax, group, styles(group.rows))
        ks = sorted({entry["k"] for record in group.records for entry in record["quality"]} - {None})
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_ylabel(quality_label(group))
        figure.legend(loc="outside lower center", ncols=2)
        add_title(figure, group)


def _by_k(ax, group: Group, look: dict[str, dict], least_share: float = 0, by_share: bool = False) -> None:
    """Curves of sparse rows from a share of E on, dense rows as lines."""
    for row in group.rows:
        points, style = quality_points(row), look[row.label]
        line = "-" if row.records[0].get("pretrained", {"transferred": row.sparse})["transferred"] else "--"
        if not row.sparse:
            ax.axhline(points[0][2], color=style["color"], linestyle=line, linewidth=1.3, label=row.label)
            continue
        ks, _, means, spreads = zip(*(point for point in points if point[0] >= least_share * row.experts), strict=True)
        xs, bars = [k / row.experts for k in ks] if by_share else ks, spreads if any(spreads) else None
        ax.errorbar(xs, means, yerr=bars, label=row.label, linestyle=line, capsize=3, elinewidth=1, markersize=5, **style)
    if any(row.sparse for row in group.rows):
        ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"1/{1 / x:g}" if x < 1 else f"{x:g}")
    ax.set_xlabel("share of active experts k/E" if by_share else "active experts k")


def quality_label(group: Group) -> str:
    direction = " (lower is better)" if group.metric["lower_is_better"] else " (%)"
    return f"{group.shown}{direction}"


def add_title(figure: Figure, group: Group) -> None:
    """The title that all rows share, and how many replicates they have."""
    counts = {len(row.records) for row in group.rows}
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    folded = any(record.get("fold") is not None for record in group.records)
    spread = f"mean ± standard deviation over {seeds} {'runs' if folded else 'seeds'}" if max(counts) > 1 else "one seed"
    start = f", from {group.start}" if group.start else ""
    figure.suptitle(textwrap.fill(f"{group.title}{start}, {spread}", int(figure.get_figwidth() * 12)), fontsize=10.5)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG without the drawing library's version in it, so that equal figures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def _draw_curve(ax, points: list[tuple], look: dict, **kwargs) -> None:
    if not points:
        return
    steps, means, spreads = zip(*points, strict=True)
    ax.plot(steps, means, color=look["color"], **kwargs)
    if any(spreads):
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        ax.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _clip_start(ax, curves: list[list[tuple]]) -> None:
    """Lets the first tenth of training run out of the top: from 8 bits at step 0 the rest would be flat."""
    last = max(points[-1][0] for points in curves)
    late = [p[1] for points in curves for p in points if p[0] >= last / 10] or [p[1] for points in curves for p in points]
    pad = 0.06 * (max(late) - min(late)) or 0.1
    ax.set_ylim(min(late) - pad, max(late) + pad)


def draw_curves(group: Group, path: Path) -> None:
    """Training loss and validation at k = E against the step, and k beneath."""
    look = styles(group.rows)
    curves = {(row.label, kind): curve_points(row, kind) for row in group.rows for kind in ("train", "valid")}
    metric, trained = group.metric["name"], group.metric["training"]
    clipped = [points for (_, kind), points in curves.items() if points and (kind == "train" or trained == metric)]
    with chart(path, 2, (9.2, 5), rows=2, sharex=True, height_ratios=[3.4, 1]) as (figure, axes):
        if trained == metric:
            axes[0][1].sharey(axes[0][0])
        for i, row in enumerate(group.rows):
            style = look[row.label]
            _draw_curve(axes[0][0], curves[row.label, "train"], style, linewidth=1.2)
            marks = {"marker": style["marker"], "markersize": 4.5, "label": row.label}
            _draw_curve(axes[0][1], curves[row.label, "valid"], style, linewidth=1.5, **marks)
            _draw_k(axes[1][0], row, style, 1.4 + min(1.2 * (len(group.rows) - 1 - i), 5))
        _clip_start(axes[0][0], clipped)
        _label_curves(axes, trained, metric, group.split)
        handles, labels = axes[0][1].get_legend_handles_labels()
        if len(labels) > CROWD:
            figure.legend(handles, labels, loc="outside right center")
            figure.set_figwidth(12.2)
        else:
            axes[1][1].legend(handles, labels, loc="center", ncols=1 if len(labels) < 4 else 2)
        add_title(figure, group)


def _draw_k(ax, row: Row, style: dict, width: float) -> None:
    """The number of active experts; `width` falls from row to row, so that equal k remain visible."""
    points = [(step, k) for step, _, k, _ in row.records[0]["curve"]["train"] if k is not None]
    if not points:
        return
    steps, ks = zip(*points, strict=True)
    turns = sum(1 for k, later in itertools.pairwise(ks) if later < k)
    if turns > 2:  # up and down all the time: a line would fill the panel
        ax.plot(steps, ks, ".", color=style["color"], markersize=3)
    else:
        ax.step(steps, ks, where="post", color=style["color"], linewidth=width)


def _label_curves(axes, trained: str, metric: str, split: str) -> None:
    (train, valid), (k, legend) = axes
    train.set(title="training, at the current k", ylabel=trained)
    valid.set_title("validation, at k = E" if trained == metric else f"{split} {metric}, at k = E")
    for ax in (train, valid):
        ax.title.set_fontsize(10)
        ax.set_xlabel("step")
        ax.tick_params(labelbottom=True)
    k.set(xlabel="step", ylabel="active\nexperts k")
    values = sorted({y for line in k.lines for y in line.get_ydata()})
    if values:
        k.set_yticks(sorted({values[0], (values[0] + values[-1]) // 2, values[-1]}))
        k.set_ylim(values[0] - 1.5, values[-1] + 1.5)
    else:  # dense models only
        k.axis("off")
    legend.axis("off")


def draw_ablation(ablation: Ablation, group: Group, path: Path) -> None:
    """Panels: all k, k >= E/2, and for an ablation along a number quality at E/2 and E against it."""
    look = styles(group.rows)
    panels = 3 if ablation.axis else 2
    with chart(path, panels, (3.9 * panels + 1.4, 4.3)) as (figure, (axes,)):
        for ax, share, title in zip(axes, (0, 0.5), ("all k", "k ≥ E/2"), strict=False):
            _by_k(ax, group, look, share, ablation.by_share)
            ax.set_title(title, fontsize=10)
        axes[0].set_ylabel(quality_label(group))
        if ablation.axis:
            _by_number(axes[2], ablation, group)
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), title=ablation.title)
        add_title(figure, group)


def _by_number(ax, ablation: Ablation, group: Group) -> None:
    """A line for k = E/2 and one for k = E, for models without experts a single one; other settings that rows differ in, apart."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in group.rows:
        first = row.records[0]
        apart = {} if ablation.along in first["settings"] else first["settings"]
        for k, _, mean, spread in quality_points(row):
            if k is None or k in (row.experts // 2, row.experts):
                share = "without experts" if k is None else "k = E" if k == row.experts else "k = E/2"
                lines.setdefault(", ".join([share, *phrases(apart)]), []).append((row.number, mean, spread))
    for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
        xs, means, spreads = zip(*sorted(points), strict=True)
        ax.errorbar(xs, means, yerr=spreads if any(spreads) else None, color=colour, marker="o", markersize=4, capsize=3, label=label)
    if ablation.by_share:
        ax.set_xscale("log", base=2)  # each setting is twice the one before
    numbers = sorted({number for points in lines.values() for number, _, _ in points})
    ax.set_xticks(numbers, [f"{number:g}" for number in numbers])
    ax.set(xlabel=ablation.axis)
    ax.legend(fontsize=8)


def draw_surgery(group: Group, path: Path) -> None:
    """Quality against stored parameters, one curve for each way: directly after, where that was measured, and after training on."""
    panels = surgery_table.panels(group)
    scratch, known = surgery_table.references(group)
    with chart(path, len(panels), (4.6 * len(panels) + 1, 4.3)) as (figure, (axes,)):
        for ax, (title, (quality, size)) in zip(axes, panels.items(), strict=True):
            for name, points in surgery_table.curves(group, quality, size).items():
                known_names = [*surgery_table.CURVES, name]  # a curve looks the same in every figure
                index = known_names.index(name)
                look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                sizes, means, spreads = zip(*points, strict=True)
                ax.errorbar(sizes, means, yerr=spreads if any(spreads) else None, capsize=3, label=name, **look)
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("stored parameters (millions)")
        if scratch:
            axes[-1].plot(*zip(*scratch, strict=True), "*", color="black", markersize=12, markerfacecolor="none", label="from scratch")
        if known:
            axes[-1].axhline(statistics.mean(known), color="#666666", linewidth=0.9, linestyle="--", label="before")
        axes[0].set_ylabel(quality_label(group))
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        title = f"Surgery on {group.title}: {group.first['dataset']['title']}, all experts active, {surgery_table.seeds_of(group)}"
        figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 12)), fontsize=10.5)
