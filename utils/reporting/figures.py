"""Figures of finished runs: quality against activated parameters, and training curves. Imports matplotlib; the rest of utils does not."""

import itertools
import math
import statistics
import textwrap
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from smoe_dropout.registry import METHODS, load
from utils.reporting.framework_figure import draw_framework
from utils.reporting.records import named_architecture, pretraining, quality_points, split_of

DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart, then Tol's muted one for what does not fit in; dense models take
# black and greys, yellow is too pale for lines.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#117733", "#AA4499")
FIXED_ROUTER = "random"  # its methods, which differ in how k is trained, get figures of their own
CROWD = 8  # methods beyond which the legend takes a column of its own, and k is written at one of them only
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


def styles(methods: list) -> dict[str, dict]:
    """Colour and marker of each method by title; markers differ even where colours have to repeat.

    A registered sparse method has the same ones in every figure, whichever others are drawn.
    """
    order: dict[str, int] = {}
    registered = [name for name in METHODS if load(METHODS, "method", name).sparse]
    for method in (m for m in methods if m.sparse):
        taken = order.values()
        own = registered.index(method.name) if method.name in registered else len(registered)
        order[method.title] = own if own not in taken else next(i for i in itertools.count(len(registered)) if i not in taken)
    look = {title: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for title, i in order.items()}
    for i, method in enumerate(m for m in methods if not m.sparse):
        look[method.title] = {"color": GREYS[i % len(GREYS)], "marker": DENSE_MARKERS[i % len(DENSE_MARKERS)]}
    return look


def curve_points(method, kind: str) -> list[tuple[int, float, float]]:
    """(step, mean, standard deviation) of the training loss (`kind` train) or of validation at k = E (valid), at steps every seed has."""
    by_step: dict[int, list[float]] = {}
    for record in method.records:
        key = str(record["model"]["num_experts"]) if record["sparse"] else "dense"
        for row in record["curve"][kind]:
            value = row[1] if kind == "train" else row[1].get(key)
            if value is not None:
                by_step.setdefault(row[0], []).append(value)
    whole = {step: values for step, values in by_step.items() if len(values) == len(method.records)}
    return [(step, statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for step, v in sorted(whole.items())]


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
        ax.errorbar(
            xs,
            ys,
            yerr=spreads if any(spreads) else None,
            label=title,
            **look[title],
            linestyle="none" if dense else "-",
            markersize=13 if dense and look[title]["marker"] == "*" else 6,
            linewidth=1.6,
            capsize=3,
            elinewidth=1,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=4 if dense else 3,
        )
    _label_k(ax, drawn, look, falling)
    _parameter_axis(ax, [point for points in drawn.values() for point in points])
    ax.margins(y=0.12)


def _worth_zooming(drawn: dict[str, list[tuple]], upper: dict[str, list[tuple]]) -> bool:
    """Whether small k, of poor quality, would press the trained range of k into a sliver of the figure."""
    whole, part = ([p[2] for points in d.values() for p in points] for d in (drawn, upper))
    return len(part) > 1 and max(whole) - min(whole) > 2.5 * (max(part) - min(part))


def draw_slimmable(group, path: Path) -> bool:
    """Test quality against activated parameters, one curve a sparse method; a second panel shows k >= E/2 where small k dwarfs it."""
    look = styles(group.methods)
    drawn = {method.title: quality_points(method) for method in group.methods}
    crowd = len(drawn) > CROWD
    half = {m.title: (m.records[0]["model"]["num_experts"] or 0) // 2 for m in group.methods}
    upper = {t: kept for t, points in drawn.items() if (kept := [p for p in points if p[0] is None or p[0] >= half[t]])}
    zoom = _worth_zooming(drawn, upper)
    with plt.rc_context(STYLE):
        size = (9.2 if zoom else 6.6) + 3 * crowd, 4.3 + 0.7 * crowd
        figure, axes = plt.subplots(1, 2 if zoom else 1, figsize=size, squeeze=False, layout="constrained")
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
        save(figure, path)
    return True


def draw_by_k(group, path: Path) -> bool:
    """Quality against k after fine-tuning, dense models as lines; False for models that were not fine-tuned."""
    if not pretraining(group.methods[0].records[0]):
        return False
    look = styles(group.methods)
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6.6, 4.3), layout="constrained")
        for method in group.methods:
            points = quality_points(method)
            line = "-" if method.records[0]["pretrained"]["transferred"] else "--"
            if not method.sparse:
                ax.axhline(points[0][2], color=look[method.title]["color"], linestyle=line, linewidth=1.4, label=method.title)
                continue
            ks, _, means, spreads = zip(*points, strict=True)
            bars = spreads if any(spreads) else None
            ax.errorbar(ks, means, yerr=bars, label=method.title, linestyle=line, capsize=3, elinewidth=1, **look[method.title])
        ks = sorted({entry["k"] for method in group.methods for record in method.records for entry in record["quality"]} - {None})
        if ks:
            ax.set_xscale("log", base=2)
            ax.set_xticks(ks, [str(k) for k in ks])
        ax.set(xlabel="active experts k", ylabel=quality_label(group))
        figure.legend(loc="outside lower center", ncols=2)
        add_title(figure, group)
        save(figure, path)
    return True


def quality_label(group) -> str:
    direction = " (lower is better)" if group.metric["lower_is_better"] else " (%)"
    return f"{split_of(group.methods[0].records[0])} {group.metric['name']}{direction}"


def add_title(figure: Figure, group) -> None:
    counts = {len(method.records) for method in group.methods}
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    folded = any(record.get("fold") is not None for method in group.methods for record in method.records)
    spread = f"mean ± standard deviation over {seeds} {'runs' if folded else 'seeds'}" if max(counts) > 1 else "one seed"
    first = group.methods[0].records[0]
    start = f", from {start}" if (start := pretraining(first)) else ""
    model = "".join(f"{name} on " for name in named_architecture(first))
    title = f"{model}{group.dataset['title']}, preset {group.preset}{start}, {spread}"
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 12)), fontsize=10.5)


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


def draw_curves(group, path: Path) -> bool:
    """Training loss and validation at k = E against the step, and k beneath; False where no record has a curve."""
    look = styles(group.methods)
    curves = {(m.title, kind): curve_points(m, kind) for m in group.methods for kind in ("train", "valid")}
    found = [points for points in curves.values() if points]
    if not found:
        return False
    metric, trained = group.metric["name"], group.metric.get("training", group.metric["name"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.2, 5), sharex=True, layout="constrained", height_ratios=[3.4, 1])
        if trained == metric:
            axes[0][1].sharey(axes[0][0])
        for i, method in enumerate(group.methods):
            train, valid = curves[method.title, "train"], curves[method.title, "valid"]
            style = look[method.title]
            _draw_curve(axes[0][0], train, style, linewidth=1.2)
            _draw_curve(axes[0][1], valid, style, linewidth=1.5, marker=style["marker"], markersize=4.5, label=method.title)
            _draw_k(axes[1][0], method, style, 1.4 + min(1.2 * (len(group.methods) - 1 - i), 5))
        _clip_start(
            axes[0][0], found if trained == metric else [points for (_, kind), points in curves.items() if kind == "train" and points]
        )
        _label_curves(axes, trained, metric, split_of(group.methods[0].records[0]))
        add_title(figure, group)
        save(figure, path)
    return True


def _draw_k(ax, method, style: dict, width: float) -> None:
    """The number of active experts; `width` falls from method to method, so that equal k remain visible."""
    rows = [row for row in method.records[0]["curve"]["train"] if row[2] is not None]
    turns = sum(1 for (_, _, k, _), (_, _, later, _) in itertools.pairwise(rows) if later < k)
    if turns > 2:  # up and down all the time: a line would fill the panel
        ax.plot([row[0] for row in rows], [row[2] for row in rows], ".", color=style["color"], markersize=3)
    elif rows:
        ax.step([row[0] for row in rows], [row[2] for row in rows], where="post", color=style["color"], linewidth=width)


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
    handles, labels = valid.get_legend_handles_labels()
    legend.legend(handles, labels, loc="center", ncols=2)


def draw_all(groups: list, folder: Path, prefix: str = "") -> list[Path]:
    """Draws every figure there are records of, and the framework; returns the files written."""
    written = []
    for group in groups:
        fixed = replace(group, methods=[m for m in group.methods if not m.sparse or m.records[0]["model"].get("router") == FIXED_ROUTER])
        kinds = [("slimmable", draw_slimmable, group), ("by_k", draw_by_k, group), ("curves", draw_curves, group)]
        variants = 1 < sum(m.sparse for m in fixed.methods) < sum(m.sparse for m in group.methods)
        if variants and not pretraining(group.methods[0].records[0]):
            kinds += [("fixed_router", draw_slimmable, fixed), ("fixed_router_curves", draw_curves, fixed)]
        for kind, draw, drawn in kinds:
            path = folder / f"{prefix}{'_' if prefix else ''}{kind}_{group.stem('_')}.png"
            if draw(drawn, path):
                written.append(path)
    draw_framework(folder / "framework.png")
    return [*written, folder / "framework.png"]
