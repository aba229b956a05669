"""The method in one picture: from a dense FFN to experts under a random, frozen router, the growing k, and the choice of k afterwards."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, PALE, GREY = "#222222", "#f4f4f2", "#8a8a8a"
EXPERTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's palette
ACTIVE = (0, 2, 5)  # the experts that the drawn router picks
NAMES = ("1", "2", "3", "4", "…", "E")


def _box(ax, x: float, y: float, w: float, h: float, text: str = "", face: str = "white", edge: str = INK, **kwargs) -> None:
    size, style, colour = kwargs.pop("size", 9.5), kwargs.pop("style", "-"), kwargs.pop("colour", INK)
    shape = "round,pad=0,rounding_size=1.2"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=1.2, linestyle=style, **kwargs))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=colour)


def _arrow(ax, start: tuple, end: tuple, colour: str = INK, width: float = 1.3) -> None:
    look = {"color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, **look))


def _panel(figure, place: tuple, title: str, size: tuple):
    """An empty drawing surface with its own coordinates, 0..size."""
    ax = figure.add_axes(place)
    ax.set(xlim=(0, size[0]), ylim=(0, size[1]))
    ax.axis("off")
    ax.text(0, size[1], title, fontsize=11, fontweight="bold", va="top", color=INK)
    return ax


def _draw_dense(figure) -> None:
    ax = _panel(figure, (0.015, 0.03, 0.235, 0.95), "1  Modularise", (50, 100))
    ax.text(0, 93.5, "A dense FFN, cut along its hidden\nwidth D into E experts of D/E", fontsize=9, va="top", color=INK)
    _box(ax, 15, 9, 20, 7, "x  (width d)", face=PALE)
    _box(ax, 15, 69, 20, 7, "y  (width d)", face=PALE)
    ax.fill([15, 35, 47, 3], [18.5, 18.5, 37, 37], color="#dcdcdc")
    ax.fill([3, 47, 35, 15], [48, 48, 66.5, 66.5], color="#dcdcdc")
    ax.text(25, 27.5, "W$_1$,  d → D", ha="center", va="center", fontsize=9.5)
    ax.text(25, 57.5, "W$_2$,  D → d", ha="center", va="center", fontsize=9.5)
    width = 44 / len(EXPERTS)
    for i, (colour, name) in enumerate(zip(EXPERTS, NAMES, strict=True)):
        ax.add_patch(Rectangle((3 + i * width, 38.5), width, 8, facecolor=colour, edgecolor="white", linewidth=1.5))
        ax.text(3 + (i + 0.5) * width, 42.4, name, ha="center", va="center", fontsize=9.5, color="white", fontweight="bold")


def _draw_experts(ax) -> None:
    for i, (colour, name) in enumerate(zip(EXPERTS, NAMES, strict=True)):
        x, on = 1 + i * 16.6, i in ACTIVE
        label = name if name == "…" else f"expert {name}"
        _box(
            ax,
            x,
            50,
            14,
            9,
            label,
            face=colour if on else "white",
            edge=colour,
            style="-" if on else "--",
            colour="white" if on else GREY,
            size=8.3,
        )
        if on:
            _arrow(ax, (x + 7.6, 39.5), (x + 7.6, 49.7), colour)
            ax.text(x + 8.8, 44.5, f"g$_{name}$", fontsize=10, color=colour, va="center")
            _arrow(ax, (x + 7.6, 59.3), (50 + (x - 42) * 0.22, 69.7), colour)


def _draw_layer(figure) -> None:
    ax = _panel(figure, (0.285, 0.03, 0.40, 0.95), "2  Route at random, k of E experts a token", (100, 100))
    ax.text(
        0,
        93.5,
        "The experts learn, the choice among them does not.\nFilled: run for this token; dashed: skipped",
        fontsize=9,
        va="top",
        color=INK,
    )
    _box(ax, 40, 1, 20, 7, "x  (token)", face=PALE)
    _arrow(ax, (50, 8.3), (50, 13.7))
    _box(ax, 1, 14, 98.2, 12, face="#e3f0fa", edge="#0072B2")
    ax.text(50, 22.6, "router:  h(x) = W x + b,  W random", ha="center", va="center", fontsize=10)
    ax.text(50, 17.4, "❄  frozen: drawn once, never trained", ha="center", va="center", fontsize=9, color="#0072B2", fontweight="bold")
    _arrow(ax, (50, 26.3), (50, 30.2))
    _box(ax, 1, 30.5, 98.2, 8.7, "top-k of h;  gate  g = softmax over the k kept logits", face=PALE)
    _draw_experts(ax)
    _box(ax, 24, 70, 52, 8.5, r"y = $\Sigma_{i\,\in\,top\,k}$  g$_i$ · expert$_i$(x)", face=PALE, size=10)
    _arrow(ax, (50, 78.8), (50, 84))


def _plot_axes(figure, place: tuple, title: str, note: str):
    ax = figure.add_axes(place)
    ax.spines[["top", "right"]].set_visible(False)
    figure.text(place[0] - 0.035, place[1] + place[3] + 0.115, title, fontsize=11, fontweight="bold", color=INK, va="top")
    figure.text(place[0] - 0.035, place[1] + place[3] + 0.057, note, fontsize=9, color=INK, va="top")
    return ax


def _draw_schedule(figure) -> None:
    ax = _plot_axes(figure, (0.765, 0.60, 0.22, 0.265), "3  Let k grow while training", "from E/2 to E active experts")
    low, high, total = 8, 16, 200
    steps = [round((high - low) * t / total) + low for t in range(total + 1)]
    ax.step(range(total + 1), steps, where="post", color="#D55E00", linewidth=2.2)
    ax.set(xlim=(0, total), ylim=(low - 2, high + 1), xticks=[0, total], yticks=[low, high])
    ax.set_xticklabels(["0", "T"])
    ax.set_yticklabels(["E/2", "E"])
    ax.set_xlabel("training step", fontsize=9, labelpad=-8)
    ax.set_ylabel("k", fontsize=10, rotation=0, labelpad=-6)


def _draw_slimming(figure) -> None:
    ax = _plot_axes(figure, (0.765, 0.105, 0.22, 0.265), "4  Pick any k afterwards", "one model, self-slimmable")
    ks = [1 + 15 * i / 60 for i in range(61)]
    ax.plot(ks, [1 - k**-0.75 for k in ks], color="#009E73", linewidth=2.2)
    chosen = (2, 4, 8, 16)
    ax.plot(chosen, [1 - k**-0.75 for k in chosen], "o", color="#009E73", markersize=7, markeredgecolor="white")
    ax.set(xlim=(0.4, 16.8), ylim=(-0.05, 1.02), xticks=[1, 8, 16], yticks=[])
    ax.set_xticklabels(["1", "E/2", "E"])
    ax.set_xlabel("k at inference (cost)", fontsize=9)
    ax.set_ylabel("quality (sketch)", fontsize=9)


def draw_framework(path: Path) -> None:
    """Draws the framework figure as a PNG."""
    figure = plt.figure(figsize=(10, 5.0))
    _draw_dense(figure)
    _draw_layer(figure)
    _draw_schedule(figure)
    _draw_slimming(figure)
    for x in (0.267, 0.70):
        figure.add_artist(plt.Line2D([x, x], [0.04, 0.96], color="#d5d5d5", linewidth=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)
