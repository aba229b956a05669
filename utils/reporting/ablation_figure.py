"""The figure of an ablation: quality by k, a curve for each setting; where settings are numbers, quality along them. Imports matplotlib."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from utils.reporting.figures import COLOURS, STYLE, add_title, quality_label, save, styles
from utils.reporting.records import quality_points


def draw(ablation, group, path: Path) -> None:
    """Panels: all k, k >= E/2, and of an ablation along a number quality at E/2 and E against it."""
    look = styles(group.methods)
    with plt.rc_context(STYLE):
        panels = 3 if ablation.axis else 2
        figure, axes = plt.subplots(1, panels, figsize=(3.9 * panels + 1.4, 4.3), layout="constrained")
        for ax, share, title in zip(axes, (0, 0.5), ("all k", "k ≥ E/2"), strict=False):
            _by_k(ax, group, look, share, ablation.by_share)
            ax.set_title(title, fontsize=10)
        axes[0].set_ylabel(quality_label(group))
        if ablation.axis:
            _by_number(axes[2], ablation, group)
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), title=ablation.title)
        add_title(figure, group)
        save(figure, path)


def _by_k(ax: Axes, group, look: dict[str, dict], least_share: float, by_share: bool) -> None:
    for method in group.methods:
        points, style = quality_points(method), look[method.title]
        if not method.sparse:
            ax.axhline(points[0][2], color=style["color"], linestyle="--", linewidth=1.2, label=method.title)
            continue
        experts = method.records[0]["model"]["num_experts"]
        points = [point for point in points if point[0] >= least_share * experts]
        ks, _, means, spreads = zip(*points, strict=True)
        bars = spreads if any(spreads) else None
        xs = [k / experts for k in ks] if by_share else ks
        ax.errorbar(xs, means, yerr=bars, label=method.title, capsize=3, elinewidth=1, markersize=5, **style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"1/{1 / x:g}" if x < 1 else f"{x:g}")
    ax.set_xlabel("share of active experts k/E" if by_share else "active experts k")


def _by_number(ax: Axes, ablation, group) -> None:
    """A line for k = E/2 and one for k = E, or of models without experts one; of each kind of rows that share all but the number."""
    rows = {row.label: row for row in ablation.rows}
    lines: dict[tuple, list[tuple[int, float, float]]] = {}
    for method in group.methods:
        row, experts = rows[method.title], method.records[0]["model"]["num_experts"]
        kind = (row.method, row.departs) if ablation.size else ()  # else the number is what the method departs in
        for k, _, mean, spread in quality_points(method):
            if k is None or k in (experts // 2, experts):
                share = "without experts" if k is None else "k = E" if k == experts else "k = E/2"
                lines.setdefault((share, kind), []).append((row.number, mean, spread))
    for ((share, kind), points), colour in zip(lines.items(), COLOURS, strict=False):
        xs, means, spreads = zip(*sorted(points), strict=True)
        label = f"{share} {kind[1]}" if kind and kind[1] else share
        ax.errorbar(xs, means, yerr=spreads if any(spreads) else None, color=colour, marker="o", markersize=4, capsize=3, label=label)
    if ablation.by_share:
        ax.set_xscale("log", base=2)  # each setting is twice the one before
    numbers = sorted({number for points in lines.values() for number, _, _ in points})
    ax.set_xticks(numbers, map(str, numbers))
    ax.set(xlabel=ablation.axis)
    ax.legend(fontsize=8)
