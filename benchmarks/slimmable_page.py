"""python -m benchmarks.slimmable_page: the page of the records of `python -m benchmarks slimmable`, and its figures. Imports matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import slimmable_tasks
from benchmarks.slimmable_table import COSTS, DENSE, FIGURES, RECORDS, dense_row, load, others, perplexity, render, stages
from utils.data.rows import kind_of
from utils.errors import run_main
from utils.reporting.figures import COLOURS, GREYS, MARKERS, STYLE, save
from utils.reporting.groups import Row
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


def draw_tasks(tasks: dict[str, list[Row]], path: Path) -> None:
    """Score against the share of active experts, a panel for each task with experts; bars are from the worst seed to the best."""
    tasks = {task: rows for task, rows in tasks.items() if any(row.sparse for row in rows)}
    labels = list(dict.fromkeys(row.label for rows in tasks.values() for row in rows if row.sparse))
    with plt.rc_context(STYLE):
        height = 3.9 + 0.24 * len(labels)
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks) + 3.2, height), squeeze=False, layout="constrained")
        for ax, (task, rows) in zip(axes[0], tasks.items(), strict=True):
            for row in rows:
                points = {share: values for share in slimmable_tasks.SHARES if (values := slimmable_tasks.scores(row, share))}
                if not row.sparse:
                    dense = slimmable_tasks.mean(points[1])
                    ax.axhspan(dense - slimmable_tasks.BAR, dense, color=GREYS[2], alpha=0.3, linewidth=0)
                    ax.axhline(dense, color=GREYS[0], linewidth=1, linestyle=":", label=f"{DENSE}, and {slimmable_tasks.BAR} points less")
                    continue
                place = labels.index(row.label)
                means = [slimmable_tasks.mean(values) for values in points.values()]
                spread = [[at - min(values) for at, values in zip(means, points.values(), strict=True)]]
                spread += [[max(values) - at for at, values in zip(means, points.values(), strict=True)]]
                look = {"color": COLOURS[place], "marker": MARKERS[place % len(MARKERS)], "markersize": 5, "capsize": 2, "label": row.label}
                ax.errorbar([1 / share for share in points], means, spread, **look)
            ax.set_xscale("log", base=2)
            ax.set_xticks([1 / share for share in slimmable_tasks.SHARES])
            ax.xaxis.set_major_formatter(lambda share, _: "E" if share == 1 else f"E/{1 / share:g}")
            ax.set(xlabel="active experts, k", title=kind_of(task).title)
        axes[0, 0].set_ylabel("score in percent")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left")
        save(figure, path)


def main() -> None:
    """Renders the page, and draws a figure for each language model and for each model that was fine-tuned."""
    update_page(PAGE, "slimmable", render())
    update_page(PAGE, "tasks", slimmable_tasks.render())
    for record in load():
        name = record["model"]["name"]
        if paths := slimmable_tasks.paths_of(RECORDS / name):
            with writing(slimmable_tasks.figure_of(name)) as file:
                draw_tasks(slimmable_tasks.rows_of(paths), file)
        if stages(record) and "perplexity" in dense_row(record):
            with writing(FIGURES / f"{record['model']['name']}.png") as file:
                draw(record, file)


if __name__ == "__main__":
    run_main(main)
