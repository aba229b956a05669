"""Figures of finished runs: quality against parameters and k, training curves. Imports matplotlib; tables do without."""

import io
import itertools
import statistics
import textwrap
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator

from smoe_dropout.registry import METHODS, load
from utils import documents
from utils.reporting import surgery_table
from utils.reporting.ablations import Ablation, all_ablations, gaps
from utils.reporting.groups import Group, Row, mean_and_spread, quality_points
from utils.reporting.labels import phrases
from utils.reporting.records import split_of
from utils.reporting.tables import differences, is_baseline, values_at

DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart, then Tol's muted one; dense models take black and greys, yellow is too
# pale for lines.
COLOURS = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933"),
    *("#332288", "#117733", "#AA4499", "#661100", "#44BB99"),
)
CROWD = 8  # rows beyond which the legend takes a column of its own, and only the best rows of a comparison of methods have colours
PALE = {"color": "#cccccc", "marker": "", "linewidth": 0.8, "elinewidth": 0, "capsize": 0, "zorder": 1.5}
GREYS = ("#000000", "#666666", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE_MARKERS = ("*", "p", "h", "d", "8")
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 10,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
Points = list[tuple[float, float, float]]


@dataclass
class Panel:
    """One pair of axes. lines: (x, mean, standard deviation) by label. levels: horizontal lines. looks: by label, on top of the figure's.
    ks: (k, x, y) to write at a line. scale: of x, "linear", "k" (base 2) or "number" (ticks at the points). legend: its own one.
    limits: of the y axis. ticks: the places along x, by number or in words.
    """

    xlabel: str
    title: str = ""
    ylabel: str = ""
    lines: dict[str, Points] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    looks: dict[str, dict] = field(default_factory=dict)
    ks: Points = field(default_factory=list)
    scale: str = "linear"
    legend: bool = False
    limits: tuple[float, float] | None = None
    ticks: list[float | str] = field(default_factory=list)


def styles(rows: list[Row]) -> dict[str, dict]:
    """Colour, marker and line of each row by label. A registered sparse method looks the same in every figure; its variants take the first
    colours that are left, and these repeat only when all are taken, with another marker.
    """
    registered = [name for name in METHODS if load(METHODS, "method", name).sparse]
    sparse = [row for row in rows if row.sparse]
    own: dict[str, int] = {}
    for row in sparse:
        name = row.first["method"]
        if name in registered and not row.first["settings"] and registered.index(name) not in own.values():
            own[row.label] = registered.index(name)
    taken = {i % len(COLOURS) for i in own.values()}
    others = (i for i in itertools.count(len(COLOURS)) if i not in own.values())
    rest = itertools.chain((i for i in range(len(COLOURS)) if i not in taken), others)
    order = own | {row.label: next(rest) for row in sparse if row.label not in own}
    look = {label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for label, i in order.items()}
    for i, row in enumerate(row for row in rows if not row.sparse):
        look[row.label] = {"color": GREYS[i % len(GREYS)], "marker": DENSE_MARKERS[i % len(DENSE_MARKERS)]}
    for row in rows:
        look[row.label]["linestyle"] = "-" if row.first.get("pretrained", {"transferred": True})["transferred"] else "--"
    return look


def png(figure: Figure) -> bytes:
    """A PNG without the drawing library's version in it, so that equal figures are equal files."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return content.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    documents.replace(path, png(figure))


def draw_panels(path: Path, group: Group, panels: list[Panel], looks: dict[str, dict]) -> None:
    """Draws panels side by side with one legend below, or beside them for many rows, and saves the figure."""
    crowd = len({label for panel in panels if not panel.legend for label in (*panel.lines, *panel.levels)}) > CROWD
    size = max(6.6, 3.9 * len(panels) + 1.4) + 3 * crowd, 4.3 + 0.7 * crowd
    with plt.rc_context(STYLE):
        figure, (axes,) = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        entries: dict[str, object] = {}
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, {label: looks.get(label, {}) | panel.looks.get(label, {}) for label in (*panel.lines, *panel.levels)})
            handles, labels = ax.get_legend_handles_labels()
            if panel.legend:
                ax.legend(fontsize=8)
            else:
                entries = dict(zip(labels, handles, strict=True)) | entries
        fitting = max(1, int(figure.get_figwidth() / (0.062 * max(map(len, entries)) + 0.5)))  # inches of the widest label
        columns = 1 if crowd else min(4 if len(panels) > 1 else 3, len(entries), fitting)
        place = "outside right center" if crowd else "outside lower center"
        order = [row.label for row in group.rows]
        labels = sorted(entries, key=lambda label: order.index(label) if label in order else len(order))
        figure.legend([entries[label] for label in labels], labels, loc=place, ncols=columns)
        _add_title(figure, group)
        save(figure, path)


def _draw_panel(ax, panel: Panel, looks: dict[str, dict]) -> None:
    for label, height in panel.levels.items():
        look = {"label": label} | looks[label]
        own = {"linestyle": ":"} if label in panel.lines else {"linestyle": look["linestyle"], "label": look["label"]}
        ax.axhline(height, color=look["color"], linewidth=1.2, **own)
    for label, points in panel.lines.items():
        xs, means, spreads = zip(*points, strict=True)
        size = 11 if looks[label].get("marker") == "*" else 5
        look = {"label": label, "markersize": size, "capsize": 3, "elinewidth": 1, "linewidth": 1.6} | looks[label]
        ax.errorbar(xs, means, yerr=spreads if any(spreads) else None, **look)
    falling = len(panel.ks) > 1 and panel.ks[0][2] > panel.ks[-1][2]
    for k, x, y in panel.ks:
        shift, side = ((5, 4), "left") if falling else ((-5, 4), "right")
        text = ax.annotate(f"k = {k}", (x, y), shift, textcoords="offset points", ha=side, fontsize=8)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title, ylim=panel.limits)
    ax.margins(x=0.08, y=0.1)
    if panel.scale in ("k", "number"):
        xs = sorted({x for points in panel.lines.values() for x, _, _ in points})
        if panel.scale == "k":
            ax.set_xscale("log", base=2)
        names = {_position(panel.ticks, at): str(at) for at in panel.ticks}
        ax.set_xticks(xs, [names.get(x) or (f"1/{1 / x:g}" if x < 1 else f"{x:g}") for x in xs])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_minor_locator(NullLocator())


def _position(ticks: list[float | str], at: float | str) -> float:
    """Where a place along x is drawn; words stand at equal distances."""
    return ticks.index(at) if isinstance(at, str) else at


def _quality_label(group: Group) -> str:
    return f"{group.shown}{' (lower is better)' if group.metric['lower_is_better'] else ' (%)'}"


def quality_panel(group: Group, against: str, least: float = 0, title: str = "", named: Container[str] | None = None) -> Panel:
    """Quality of every row against activated "parameters", "k" or the "share" k/E, from a share `least` of E on.

    named: labels of the rows of which one may have its k written at it; None: all.
    """
    counts = {row.experts for row in group.rows if row.sparse}
    experts = f" (E = {min(counts)})" if len(counts) == 1 else ""
    axis = {
        "parameters": "activated parameters per token (millions)",
        "k": f"active experts k{experts}",
        "share": "share of active experts k/E",
    }
    panel = Panel(axis[against], title, _quality_label(group), scale="k" if counts and against != "parameters" else "linear")
    labelled: list[tuple[float, Points]] = []
    for row in group.rows:
        points = [point for point in quality_points(row) if (point[0] or 0) >= least * row.experts]
        if not row.sparse:
            panel.levels[row.label] = points[0][2]
        if points and (row.sparse or against == "parameters"):
            x = {"parameters": lambda _, active: active / 1e6, "k": lambda k, _: k, "share": lambda k, _, e=row.experts: k / e}[against]
            panel.lines[row.label] = [(x(k, active), mean, spread) for k, active, mean, spread in points]
            if row.sparse and against == "parameters" and (named is None or row.label in named):
                labelled.append((statistics.mean(point[2] for point in points), [(k, x(k, active), mean) for k, active, mean, _ in points]))
    panel.ks = max(labelled, default=(0, []))[1]  # of the highest curve only
    return panel


def in_front(group: Group) -> set[str]:
    """Labels of at most CROWD rows: the baselines, then the best row at each k, k = E first, the second best, and so on."""
    by_share: dict[float, list[tuple[float, str]]] = {}
    for row in group.rows:
        for k, _, mean, _ in quality_points(row):
            ranked = by_share.setdefault(k / row.experts if row.sparse else 1.0, [])
            ranked.append((mean if group.metric["lower_is_better"] else -mean, row.label))
    best = itertools.zip_longest(*(sorted(by_share[share]) for share in sorted(by_share, reverse=True)))
    baselines = [row.label for row in group.rows if is_baseline(row)]
    labels = dict.fromkeys([*baselines, *(one[1] for place in best for one in place if one)])
    return {*[*labels][:CROWD]}


def method_looks(group: Group) -> dict[str, dict]:
    """The styles of a comparison of methods: those of more than CROWD rows that are not in front are pale and not named."""
    front = in_front(group)
    looks = styles([row for row in group.rows if row.label in front])
    behind = [row.label for row in group.rows if row.label not in front]
    for label in behind:
        looks[label] = PALE | {"label": "_" + label, "linestyle": "-"}
    if behind:
        looks[behind[0]]["label"] = f"{len(behind)} others"
    return looks


def draw_quality(group: Group, path: Path) -> None:
    """Quality against k after fine-tuning, otherwise against activated parameters, with a second panel where there are k below E/2.

    Of many rows the axes hold those in front.
    """
    front = in_front(group)
    panels = [quality_panel(group, "k" if group.start else "parameters", named=front)]
    upper = quality_panel(group, "parameters", 0.5, "k ≥ E/2", front)
    if not group.start and upper.lines not in ({}, panels[0].lines):
        panels[0].title = "all k"
        panels.append(upper)
    for panel in panels if len(front) < len(group.rows) else ():
        shown = [mean for label in front & panel.lines.keys() for _, mean, _ in panel.lines[label]]
        margin = 0.1 * (max(shown) - min(shown))
        panel.limits = min(shown) - margin, max(shown) + margin
    draw_panels(path, group, panels, method_looks(group))


def draw_ablation(ablation: Ablation, group: Group, path: Path) -> None:
    """Panels: all k, k >= E/2, and for an ablation along a number quality at E/2 and E against it."""
    against = "share" if ablation.by_share else "k"
    panels = [quality_panel(group, against, least, title) for least, title in ((0, "all k"), (0.5, "k ≥ E/2"))]
    if ablation.axis:
        panel = Panel(ablation.axis, "k = E/2 and k = E", scale="k" if ablation.by_share else "number", legend=True)
        panels.append(panel)
        for row in group.rows:
            apart = {} if ablation.along in row.first["settings"] else row.first["settings"]
            for k, _, mean, spread in quality_points(row):
                if k in (None, row.experts // 2, row.experts):
                    share = "without experts" if k is None else "k = E" if k == row.experts else "k = E/2"
                    panel.lines.setdefault(", ".join([share, *phrases(apart)]), []).append((row.number, mean, spread))
        panel.looks = {label: {"color": colour, "marker": "o"} for label, colour in zip(panel.lines, COLOURS, strict=False)}
    draw_panels(path, replace(group, title=f"{ablation.title}: {group.title}"), panels, styles(group.rows))


def draw_study(study: Ablation, group: Group, path: Path) -> None:
    """Panels: quality at k = E and at E/2, or its gap to the baseline if recorded, and the loss from E to E/2; one curve a label."""
    baseline = study.baseline if any(row.label == study.baseline for row in group.rows) else None
    gap = f", gap to {baseline}" if baseline else ""
    quality = _quality_label(group)
    panels = [Panel(study.axis, f"k = {share}{gap}", quality) for share in ("E", "E/2")] + [
        Panel(study.axis, "loss from E to E/2", quality)
    ]
    scale = "number" if isinstance(study.places[0], str) or 0 in study.places else "k"
    for panel, share in zip(panels, ("E", "E/2", None), strict=True):
        panel.scale, panel.ticks = scale, study.places
        for row in group.rows:
            if share is None:
                values = differences(row, "E/2", row, "E")
            else:
                values = gaps(study, group, row, share) if baseline else values_at(row, share, split_of(row.first))
            if values:
                panel.lines.setdefault(row.label, []).append((_position(study.places, row.number), *mean_and_spread(values)))
        if baseline and share:
            panel.levels[baseline] = 0.0
    rows = list({row.label: row for row in group.rows}.values())
    labels = list(dict.fromkeys(row.label for one in all_ablations().values() if one.preset for row in one.rows))  # alike in every study
    looks = styles([row for row in rows if not row.sparse])
    for row in (row for row in rows if row.sparse):
        i = labels.index(row.label)
        looks[row.label] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
    if any(isinstance(at, str) for at in study.places):  # places in words are no curve
        looks = {label: look | {"linestyle": "none"} for label, look in looks.items()}
    draw_panels(path, replace(group, title=f"{study.title}: {group.title}", rows=rows), panels, looks)


def draw_own_k(study: Ablation, group: Group, path: Path) -> None:
    """The baseline against k, and every other row at the k of its training."""
    panel = quality_panel(group, "k")
    own = sorted(point for row in group.rows if row.number for point in panel.lines.pop(row.label) if point[0] == row.number)
    (base,) = panel.lines
    panel.lines["one model for each k"] = own
    looks = {base: {"color": COLOURS[0], "marker": "o"}, "one model for each k": {"color": COLOURS[1], "marker": "s", "linestyle": "none"}}
    draw_panels(path, replace(group, title=f"{study.title}: {group.title}"), [panel], looks)


def draw_surgery(group: Group, path: Path) -> None:
    """Quality against stored parameters, a curve per operation: directly after, where it was measured, and after further training."""
    panels = [Panel("stored parameters (millions)", surgery_table.FURTHER, _quality_label(group), surgery_table.curves(group, False))]
    if surgery_table.on_the_text(group.first):
        panels.insert(0, replace(panels[0], title="directly after", lines=surgery_table.curves(group, True)))
    names = dict.fromkeys([*surgery_table.CURVES, *panels[-1].lines])  # a curve looks the same in every figure
    looks = {name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}
    looks[scratch := "trained from scratch"] = {"color": "black", "marker": "*", "linestyle": "none", "markerfacecolor": "none"}
    looks[whole := "before surgery, all experts"] = {"color": GREYS[1], "linestyle": "--"}
    others = {id(other): other for row in group.rows for other in surgery_table.from_scratch(row.first, group.others)}.values()
    if others:
        panels[-1].lines[scratch] = [(other["parameters"]["total"] / 1e6, surgery_table.recovered(other), 0) for other in others]
    known = [value for record in group.records if (value := surgery_table.before(record, group.others)) is not None]
    if known:
        panels[-1].levels = {whole: statistics.mean(known)}
    title = f"Surgery on {group.title}: {group.first['dataset']['title']}, k = E"
    draw_panels(path, replace(group, title=title, start=""), panels, looks)


def curve_points(row: Row, kind: str) -> Points:
    """(step, mean, standard deviation) of the training loss (`kind` train) or of validation at k = E (valid), at steps every seed has."""
    key = str(row.experts) if row.sparse else "dense"
    by_step: dict[int, list[float]] = {}
    for step, value, *_ in (line for record in row.records for line in record["curve"][kind]):
        if kind == "train" or key in value:
            by_step.setdefault(step, []).append(value if kind == "train" else value[key])
    return [(step, *mean_and_spread(values)) for step, values in sorted(by_step.items()) if len(values) == len(row.records)]


def draw_curves(group: Group, path: Path) -> None:
    """Panels: training loss, validation at k = E, and k, against the step."""
    metric, trained, split = group.metric["name"], group.metric["training"], split_of(group.first)
    percent = "" if group.metric["lower_is_better"] else " (%)"
    train = Panel("step", "training, at the current k", trained + " (nats)" * (trained == "loss"))
    valid = Panel("step", "validation, at k = E" if trained == metric else f"{split}, at k = E", metric + percent)
    active = Panel("step", "k in training", "active experts k")
    for i, row in enumerate(group.rows):
        for panel, kind in ((train, "train"), (valid, "valid")):
            if points := curve_points(row, kind):
                panel.lines[row.label] = points
        train.looks[row.label] = {"marker": "", "errorevery": 5}
        if points := [(step, k, 0) for step, _, k, _ in row.first["curve"]["train"] if k is not None]:
            active.lines[row.label] = points
            random = sum(later < k for (_, k, _), (_, later, _) in itertools.pairwise(points)) > 2  # a line would fill the panel
            # Lines become thinner from row to row, so that equal k remain visible.
            line = {"marker": "", "drawstyle": "steps-post", "linewidth": 1.4 + min(1.2 * (len(group.rows) - 1 - i), 5)}
            active.looks[row.label] = {"marker": ".", "linestyle": "none"} if random else line
    active.limits = 0, 1 + max((k for points in active.lines.values() for _, k, _ in points), default=0)
    # The first tenth of training is cut off: beside its 8 bits the rest would be flat.
    clipped = [train, valid] if trained == metric else [train]
    shown = [point for panel in clipped for points in panel.lines.values() for point in points]
    late = [mean for step, mean, _ in shown if step >= max(shown)[0] / 10] or [0]
    pad = 0.06 * (max(late) - min(late)) or 0.1
    for panel in clipped:
        panel.limits = min(late) - pad, max(late) + pad
    draw_panels(path, group, [panel for panel in (train, valid, active) if panel.lines], method_looks(group))


def _add_title(figure: Figure, group: Group) -> None:
    """The title that all rows share, then what they started from and the number of replicates."""
    counts = {len(row.records) for row in group.rows}
    runs = "runs" if any(record.get("fold") is not None for record in group.records) else "seeds"
    spread = (
        f"mean ± standard deviation, n = {'–'.join(map(str, sorted({min(counts), max(counts)})))} {runs}" if max(counts) > 1 else "one seed"
    )
    start = f"pre-trained on {group.start}; " if group.start else ""
    width = int(figure.get_figwidth() * 13)
    figure.suptitle(f"{textwrap.fill(group.title, width)}\n{textwrap.fill(start + spread, width)}", fontsize=10)
