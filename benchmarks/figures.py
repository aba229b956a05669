"""Records of benchmarks as figures: time of the expert layer against k, and how time grows. Imports matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.tables import FIGURES, LINES
from utils.reporting.figures import COLOURS, GREYS, MARKERS, STYLE, save

OURS = LINES["layer"].ours
AXES = {
    "num_experts": "experts E (equal operations)",
    "d_expert": "hidden width of an expert",
    "tokens": "tokens N",
    "mem_len": "positions of memory (attention)",
}
LOOKS = {
    OURS: (COLOURS[0], MARKERS[0]),
    "ours": (COLOURS[0], MARKERS[0]),
    "dense": (GREYS[0], "*"),
    "fastmoe's way": (COLOURS[1], MARKERS[1]),
    "official style": (COLOURS[2], MARKERS[2]),
}


def draw(record: dict[str, Any], folder: Path) -> None:
    """The figure of a record of "layer" or "growth", in `folder`."""
    name, _ = FIGURES[record["benchmark"]]
    with plt.rc_context(STYLE):
        save({"layer": time_by_k, "growth": growth}[record["benchmark"]](record), folder / name)


def time_by_k(record: dict[str, Any]) -> Figure:
    """Time relative to dense by k, a panel for each precision: ours (auto) and peers, smallest and largest round as bars, the bound k/E."""
    precisions = list(dict.fromkeys(row["precision"] for row in record["rows"]))
    size = 1 + 4 * len(precisions), 4.6
    figure, axes = plt.subplots(1, len(precisions), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax, precision in zip(axes[0], precisions, strict=True):
        rows = [row for row in record["rows"] if row["precision"] == precision]
        ks = [row["k"] for row in rows]
        for i, name in enumerate(name for name in rows[0]["results"] if name == OURS or not name.startswith(("ours", "dense"))):
            results = [row["results"][name] for row in rows]
            ratios = [result["ratio"] for result in results]
            below = [result["ratio"] - result["ratio_min"] for result in results]
            above = [result["ratio_max"] - result["ratio"] for result in results]
            look = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5, "elinewidth": 0.8, "zorder": 3 if name == OURS else 2}
            ax.errorbar(ks, ratios, yerr=(below, above), label=name, linewidth=2.2 if name == OURS else 1.2, **look)
        ax.plot([0, ks[-1]], [0, ks[-1] / record["sizes"]["num_experts"]], color=GREYS[0], linestyle="--", linewidth=1, label="bound k/E")
        ax.axhline(1, color=GREYS[1], linewidth=1, linestyle=":", label="dense")
        ax.set(title=precision, xlabel="active experts k", xticks=ks)
    axes[0][0].set(ylabel="time / dense network", ylim=(0, None))
    _legend(figure, axes[0][:1])
    return figure


def growth(record: dict[str, Any]) -> Figure:
    """Milliseconds against each size that grows, a panel each, both axes logarithmic."""
    axis_names = list(dict.fromkeys(row["axis"] for row in record["rows"]))
    figure, axes = plt.subplots(1, len(axis_names), figsize=(3.1 * len(axis_names), 3.8), squeeze=False, layout="constrained")
    for ax, axis in zip(axes[0], axis_names, strict=True):
        rows = [row for row in record["rows"] if row["axis"] == axis]
        values = [row["value"] for row in rows]
        for name in rows[0]["results"]:
            colour, marker = LOOKS[name]
            times = [1e3 * row["results"][name]["seconds"] for row in rows]
            ax.plot(values, times, label="ours" if name == OURS else name, color=colour, marker=marker, markersize=5)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(AXES[axis])
        ax.set_xticks(values, [f"{value // 1024}k" if value >= 4096 else str(value) for value in values])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("milliseconds, forward and backward")
    _legend(figure, axes[0])
    return figure


def _legend(figure: Figure, axes) -> None:
    """One for all panels, each name once."""
    entries = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
