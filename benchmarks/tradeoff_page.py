"""python -m benchmarks.tradeoff_page: the page of the records of `python -m benchmarks tradeoff`, and its figure. Imports matplotlib."""

from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks.tradeoff_table import COSTS, DENSE, FIGURE, FLOPS, MASS, RECORDS, TIME, UNIFORM, Group, groups, load, render
from utils.errors import run_main
from utils.reporting.figures import COLOURS, GREYS, STYLE, save
from utils.reporting.pages import update_page, writing

PAGE = RECORDS / "page.md"
LOOKS = {
    UNIFORM: {"color": COLOURS[1], "marker": "o", "linestyle": "-", "markersize": 5},
    MASS: {"color": COLOURS[2], "marker": "^", "linestyle": "--", "markersize": 5},
    FLOPS: {"color": COLOURS[0], "marker": "s", "linestyle": "none", "markersize": 9, "markerfacecolor": "none"},
    TIME: {"color": COLOURS[3], "marker": "D", "linestyle": "none", "markersize": 9, "markerfacecolor": "none"},
    DENSE: {"color": GREYS[0], "marker": "*", "linestyle": "none", "markersize": 10},
}


def draw(found: list[Group], path: Path) -> None:
    """Quality against FLOPs per token and against time, a row of panels for each model; the grey line is the front."""
    with plt.rc_context(STYLE):
        size = 4.6 * len(COSTS), 3.6 * len(found) + 0.6
        figure, axes = plt.subplots(len(found), len(COSTS), figsize=size, squeeze=False, layout="constrained")
        for row, group in zip(axes, found, strict=True):
            for ax, (cost, label) in zip(row, COSTS.items(), strict=True):
                front = [(group.mean(way, cost), group.mean(way, group.metric)) for way in group.front(cost)]
                ax.step(*zip(*front, strict=True), where="post", color=GREYS[2], linewidth=7, alpha=0.35, label="front")
                for kind, look in LOOKS.items():
                    if points := group.points(kind, cost):
                        ax.plot([x for _, x, _ in points], [y for _, _, y in points], label=kind, **look)
                for k, x, y in group.points(UNIFORM, cost):
                    ax.annotate(f"{k:g}", (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8, color=COLOURS[1])
                ax.set(xlabel=label, ylabel=f"test {group.metric}")
            row[0].set_title(group.title.replace("; ", "\n"), loc="left", fontsize=9)
        entries = {}
        for ax in axes.flat:
            handles, labels = ax.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6)
        save(figure, path)


def main() -> None:
    """Renders the page and draws its figure."""
    update_page(PAGE, "tradeoff", render())
    with writing(FIGURE) as file:
        draw(groups(load(RECORDS)), file)


if __name__ == "__main__":
    run_main(main)
