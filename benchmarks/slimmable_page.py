"""python -m benchmarks.slimmable_page: the page of the records of `python -m benchmarks slimmable`, and its figures. Imports matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.slimmable_table import COSTS, DENSE, FIGURES, RECORDS, dense_row, load, others, perplexity, render, stages
from utils.errors import run_main
from utils.reporting.figures import COLOURS, GREYS, MARKERS, STYLE, save
from utils.reporting.pages import update_page, writing

PAGE = RECORDS / "page.md"
WORST = 20  # perplexities above this multiple of the dense model's lie outside the figure


def draw(record: dict[str, Any], path: Path) -> None:
    """Perplexity against time and against FLOPs, a line for each stage of the conversion; numbers are k."""
    dense = dense_row(record)

    def cost(row: dict[str, Any], name: str) -> float:
        return row["weights"] / dense["weights"] if name == "weights" else row.get(name, float("nan"))

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(COSTS), figsize=(9.2, 4.2), sharey=True, layout="constrained")
        for ax, (name, label) in zip(axes, COSTS.items(), strict=True):
            for place, (stage, rows) in enumerate(stages(record).items()):
                rows = [row for row in rows if row["perplexity"] <= WORST * dense["perplexity"]]
                x, y = [cost(row, name) for row in rows], [row["perplexity"] for row in rows]
                ax.plot(x, y, color=COLOURS[place], marker=MARKERS[place], markersize=5, label=stage)
                for row, at, value in zip(rows, x, y, strict=True):
                    ax.annotate(f"{row['k']}", (at, value), xytext=(4, 4), textcoords="offset points", fontsize=8, color=COLOURS[place])
            ax.axhline(dense["perplexity"], color=GREYS[2], linewidth=1, linestyle=":")
            ax.plot([1], [dense["perplexity"]], color=GREYS[0], marker="*", markersize=11, linestyle="none", label=DENSE)
            for row in others(record):
                ax.plot(
                    [cost(row, name)],
                    [perplexity(row, record)],
                    color=GREYS[1],
                    marker="*",
                    markersize=11,
                    linestyle="none",
                    label=row["name"],
                )
            ax.set(xlabel=label, yscale="log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("perplexity on held-out text")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        save(figure, path)


def main() -> None:
    """Renders the page and draws a figure for each language model."""
    update_page(PAGE, "slimmable", render())
    for record in load():
        if stages(record) and "perplexity" in dense_row(record):
            with writing(FIGURES / f"{record['model']['name']}.png") as file:
                draw(record, file)


if __name__ == "__main__":
    run_main(main)
