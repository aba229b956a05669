"""Draws framework.png, the method in one picture.

python Figs/framework.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, PALE, GREY, BLUE = "#222222", "#f4f4f2", "#8a8a8a", "#0072B2"
# Okabe and Ito's palette. The drawn router picks experts 1, 3 and E.
EXPERTS = (("1", BLUE, True), ("2", "#E69F00", False), ("3", "#009E73", True), ("4", "#CC79A7", False), ("…", "#56B4E9", False))
EXPERTS += (("E", "#D55E00", True),)


def draw_framework(path: Path) -> None:
    """Draws the framework figure as a PNG."""
    figure = plt.figure(figsize=(10, 5))
    ax = figure.add_axes((0, 0, 0.7, 1))
    ax.set(xlim=(0, 140), ylim=(0, 100))
    ax.axis("off")
    _draw_dense(ax)
    _draw_layer(ax)
    plots = {"xlabel": "training step", "ylabel": "k", "xticks": ([0, 200], ["0", "T"]), "yticks": ([8, 16], ["E/2", "E"])}
    schedule = _plot(figure, 0.6, "3  Let k grow during training", "from E/2 to E active experts", **plots)
    schedule.step(range(201), [8 + round(8 * step / 200) for step in range(201)], where="post", color="#D55E00", linewidth=2.2)
    plots = {"xlabel": "k at inference (cost)", "ylabel": "quality (sketch)", "xticks": ([1, 8, 16], ["1", "E/2", "E"]), "yticks": ([], [])}
    slimming = _plot(figure, 0.1, "4  Choose any k afterwards", "one model, self-slimmable", **plots)
    ks = [1 + step / 4 for step in range(61)]
    slimming.plot(ks, [1 - k**-0.75 for k in ks], "-o", color="#009E73", linewidth=2.2, markevery=[4, 12, 28, 60], markeredgecolor="white")
    for x in (0.267, 0.70):
        figure.add_artist(plt.Line2D([x, x], [0.04, 0.96], color="#d5d5d5", linewidth=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _plot(figure, bottom: float, title: str, note: str, xticks: tuple, yticks: tuple, **labels: str):
    ax = figure.add_axes((0.765, bottom, 0.22, 0.27))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xticks(*xticks)
    ax.set_yticks(*yticks)
    ax.set(**labels)
    _head(ax, -0.16, 1.33, title, note, transform=ax.transAxes)
    return ax


def _head(ax, x: float, y: float, title: str, note: str, **where) -> None:
    ax.annotate(title, (x, y), fontsize=11, fontweight="bold", color=INK, va="center", xycoords=where.get("transform", "data"))
    ax.annotate(note, (x, y), (0, -9), textcoords="offset points", fontsize=9, color=INK, va="top", xycoords=where.get("transform", "data"))


def _box(ax, x: float, y: float, w: float, h: float, text: str = "", face: str = PALE, edge: str = INK, **look) -> None:
    line = look.pop("linestyle", "-")
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1.2", facecolor=face, edgecolor=edge, linestyle=line))
    ax.text(x + w / 2, y + h / 2, text, **{"ha": "center", "va": "center", "fontsize": 9.5, "color": INK, **look})


def _arrow(ax, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.3})


def _draw_dense(ax) -> None:
    _head(ax, 3, 96, "1  Modularise", "A dense FFN, cut along its hidden\nwidth D into E experts of D/E")
    for y, text in ((11, "x  (width d)"), (69, "y  (width d)")):
        _box(ax, 17, y, 19, 7, text)
    for narrow, wide, middle, text in ((20, 38, 29, "W$_1$,  d → D"), (67, 49, 58, "W$_2$,  D → d")):
        ax.fill([17, 36, 47, 6], [narrow, narrow, wide, wide], color="#dcdcdc")
        ax.text(26.5, middle, text, ha="center", va="center", fontsize=9.5)
    for i, (name, colour, _) in enumerate(EXPERTS):
        ax.add_patch(Rectangle((6 + i * 41 / 6, 39.5), 41 / 6, 8, facecolor=colour, edgecolor="white", linewidth=1.5))
        ax.text(6 + (i + 0.5) * 41 / 6, 43.2, name, ha="center", va="center", fontsize=9.5, color="white", fontweight="bold")


def _draw_layer(ax) -> None:
    note = "The experts are trained, the choice among them is not.\nFilled: run for this token; dashed: skipped"
    _head(ax, 57, 96, "2  Route at random, k of E experts per token", note)
    _box(ax, 89, 3, 16, 7, "x  (token)")
    _box(ax, 57.5, 16, 79, 12, "router:  h(x) = W x + b,  W random\n", face="#e3f0fa", edge=BLUE, fontsize=10)
    ax.text(97, 19.5, "❄  frozen: drawn once, never trained", ha="center", va="center", fontsize=9, color=BLUE, fontweight="bold")
    _box(ax, 57.5, 32, 79, 8.5, "top-k of h;  gate  g = softmax over the k kept logits")
    _box(ax, 76, 70, 42, 8.5, r"y = $\Sigma_{i\,\in\,top\,k}$  g$_i$ · expert$_i$(x)", fontsize=10)
    for start, end in ((10, 16), (28, 32), (78.5, 84)):
        _arrow(ax, (97, start), (97, end))
    for i, (name, colour, active) in enumerate(EXPERTS):
        x, look = 57.5 + i * 13.5, {"fontsize": 8.3, "color": "white"} if active else {"fontsize": 8.3, "color": GREY, "linestyle": "--"}
        _box(ax, x, 51, 11.5, 9, name if name == "…" else f"expert {name}", face=colour if active else "white", edge=colour, **look)
        if active:
            _arrow(ax, (x + 5.75, 40.5), (x + 5.75, 51), colour)
            ax.text(x + 7, 45.7, f"g$_{name}$", fontsize=10, color=colour, va="center")
            _arrow(ax, (x + 5.75, 60), (97 + (x - 91) * 0.25, 70), colour)


if __name__ == "__main__":
    draw_framework(Path(__file__).with_suffix(".png"))
