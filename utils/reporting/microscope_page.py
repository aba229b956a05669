"""The page of the microscope: one HTML file with its figures in it, from the content of its record. Imports matplotlib."""

import base64
import itertools
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from utils.reporting.figures import COLOURS, MARKERS, STYLE, png
from utils.reporting.tables import DASH

COLUMNS = {  # of the table of layers: what is said of each entry of the record
    "load_entropy": ("Load entropy", "entropy of the experts' shares of assignments over log E; 1: even"),
    "load_variation": ("Load CV", "standard deviation of the load over its mean; 0: even"),
    "load_max": ("Max / mean load", "load of the most used expert over the even load, at most E/k"),
    "dead": ("Dead", "experts with less than 1 % of the even load"),
    "confidence": ("Confidence", "mean probability of the router's best expert"),
    "margin": ("Margin", "mean of the least probability of a chosen expert less the most of one that is not"),
    "mean_cosine": ("Cosine", "of the outputs of two experts for the same token, mean over tokens and pairs; 1: equal experts"),
    "mean_cka": ("CKA", "linear, of the outputs of two experts over tokens, mean over pairs; 1: equal up to rotation and scale"),
    "effective_rank": ("Effective rank", "of the outputs, a row for each expert; E: all differ, 1: all equal"),
    "weight_rank": ("Rank of weights", "the same of the experts' weights"),
    "loss_without_first": ("Loss without first", "rise of the loss in nats if tokens lose their first expert in this layer alone"),
}
MATRICES = {"co_activation": "co-activation", "cosine": "cosine of outputs", "cka": "linear CKA of outputs"}
BESIDE = 4  # curves beyond which a legend stands beside its panel
LAYERS = 6  # whose matrices are drawn, at most
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
th, td {{ padding: 3px 9px; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }} dt {{ font-weight: 600 }} dd {{ margin: 0 0 .4em 1.2em }}
img {{ max-width: 100%; display: block }} .fault {{ color: #b3261e; font-weight: 600 }}
footer {{ color: #666; font-size: 12px; margin-top: 3em }}
</style></head><body>
<h1>{title}</h1>
<p>{about}</p>
{findings}
<h2>Layers</h2>
{layers}
{figures}
<h2>By number of active experts</h2>
{by_k}
<h2>Measures</h2>
<dl>{measures}</dl>
<footer>{source}</footer>
</body></html>
"""


def render(content: dict[str, Any]) -> bytes:
    """The page. Equal content gives equal bytes."""
    layers, subject = content["layers"], content["subject"]
    name = subject.get("folder") or " ".join([subject["method"], *(f"{key}={value}" for key, value in subject["settings"].items())])
    trained = f", preset {subject['preset']}, seed {subject['seed']}, {subject['steps']:,} steps" if content["kind"] == "run" else ""
    text, k = content["text"], content["k"]
    about = f"{name}{trained}; {text.get('title') or text['name']}{', ' + text['split'] if 'split' in text else ''}: "
    about += f"{content['tokens']:,} tokens at k = {k} of {max(layer['experts'] for layer in layers)} experts in {len(layers)} layers. "
    about += f"Outputs of all experts are compared for {content['sampled']:,} of the tokens."
    faults = "".join(f'<li class="fault">{escape(sentence)}</li>' for sentence in content["findings"])
    numbered = [(str(number), layer["name"], *(_cell(layer[entry]) for entry in COLUMNS)) for number, layer in enumerate(layers)]
    qualities = [(_k(one["k"]), *(_cell(one[entry], 4) for entry in ("loss", "accuracy", "calibration_error"))) for one in content["by_k"]]
    weights = ", ".join(f"{file} {digest[:16]}" for file, digest in subject["weights_sha256"].items())
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return PAGE.format(
        title=escape(f"Microscope: {name}"),
        about=escape(about),
        findings=f"<ul>{faults}</ul>" if faults else "<p>No dead experts, no equal experts, no collapsed router.</p>",
        layers=_table(["#", "Layer", *(heading for heading, _ in COLUMNS.values())], numbered),
        figures="\n".join(_figures(content)),
        by_k=_table(["k", "Loss (nats)", "Accuracy", "Calibration error (ECE)"], qualities),
        measures="".join(f"<dt>{escape(heading)}</dt><dd>{escape(said)}</dd>" for heading, said in COLUMNS.values()),
        source=escape(f"Weights (sha256): {weights}. Commit {content['commit'] or 'unknown'}; {versions}. Numbers: microscope.json."),
    ).encode()


def _k(k: int | dict[str, int]) -> str:
    return str(k) if isinstance(k, int) else " / ".join(map(str, k.values()))


def _cell(value: Any, digits: int = 3) -> str:
    if isinstance(value, list):
        return str(len(value))
    return DASH if value is None else f"{value:.{digits}f}"


def _table(header: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _figures(content: dict[str, Any]) -> Iterator[str]:
    """Headings and figures of the parts that were measured."""
    drawings: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "Load of experts": _draw_load,
        "Routing": _draw_routing,
        "Redundancy of experts": _draw_redundancy,
        "Pairs of experts": _draw_matrices,
        "Quality at each k": _draw_by_k,
    }
    for title, draw in drawings.items():
        with plt.rc_context(STYLE):
            if figure := draw(content):
                data = base64.b64encode(png(figure)).decode()
                yield f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">'


def _panels(panels: list[tuple[str, dict[str, list], float | None]], xs: list, xlabel: str) -> Figure | None:
    """Panels side by side: title, curves by label over xs, and what the y axis, from 0, reaches at least; None: only the values.

    None without curves.
    """
    panels = [(title, lines, top) for title, curves, top in panels if (lines := {name: ys for name, ys in curves.items() if _known(ys)})]
    if not panels:
        return None
    wide = [len(lines) > BESIDE for _, lines, _ in panels]
    ratios = [1 + 0.4 * one for one in wide]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * sum(ratios) + 0.6, 3.1), squeeze=False, layout="constrained", width_ratios=ratios
    )
    for ax, beside, (title, lines, top) in zip(axes[0], wide, panels, strict=True):
        for number, (label, ys) in enumerate(lines.items()):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.6}
            ax.plot(xs, [np.nan if y is None else y for y in ys], label=label, clip_on=False, **look)
        ax.set(title=title, xlabel=xlabel)
        ax.margins(x=0.08, y=0.12)
        if top is not None:
            values = [y for ys in lines.values() for y in _known(ys)]
            ax.set_ylim(1.1 * min(0, *values, 0), max(1.1 * max(values), top))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        if len(lines) > 1 or "" not in lines:
            ax.legend(fontsize=8, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}))
    return figure


def _known(ys: list) -> list:
    return [y for y in ys if y is not None]


def _by_layer(content: dict[str, Any], entry: str) -> list:
    return [len(layer[entry]) if isinstance(layer[entry], list) else layer[entry] for layer in content["layers"]]


def _draw_load(content: dict[str, Any]) -> Figure | None:
    """Measures of the load by layer."""
    tops = {"load_entropy": 1.03, "load_variation": 0, "load_max": 1, "dead": 1}
    panels = [(COLUMNS[entry][0], {"": _by_layer(content, entry)}, top) for entry, top in tops.items()]
    return _panels(panels, list(range(len(content["layers"]))), "layer")


def _draw_routing(content: dict[str, Any]) -> Figure | None:
    """Confidence and margin by layer, and how routing changes between checkpoints."""
    panels = [(COLUMNS[entry][0], {"": _by_layer(content, entry)}, 0) for entry in ("confidence", "margin")]
    if changes := content["checkpoints"]:
        steps = [f"{step:,}" for step in changes["steps"]]
        between = (f"{one} to {other}" for one, other in itertools.pairwise(steps))
        panels += [
            ("Fluctuation: first expert changed", dict(zip(between, changes["fluctuation"], strict=True)), 0.1),
            (f"Saturation to step {steps[-1]}", dict(zip(steps, changes["saturation"], strict=False)), 1.03),
        ]
    return _panels(panels, list(range(len(content["layers"]))), "layer")


def _draw_redundancy(content: dict[str, Any]) -> Figure | None:
    """Similarity of outputs, effective ranks, and the loss without first experts, by layer."""
    similarities = {COLUMNS[entry][0]: _by_layer(content, entry) for entry in ("mean_cosine", "mean_cka")}
    ranks = {name: _by_layer(content, entry) for name, entry in (("outputs", "effective_rank"), ("weights", "weight_rank"))}
    panels = [
        ("Similarity of two experts' outputs", similarities, 1.03),
        ("Effective rank", ranks, 1.03 * max(layer["experts"] for layer in content["layers"])),
        ("Loss without first expert (nats)", {"": _by_layer(content, "loss_without_first")}, 0),
    ]
    return _panels(panels, list(range(len(content["layers"]))), "layer")


def _draw_by_k(content: dict[str, Any]) -> Figure | None:
    """Loss, accuracy and calibration error against k."""
    points = [one for one in content["by_k"] if isinstance(one["k"], int)]
    titles = {"loss": "Loss (nats)", "accuracy": "Accuracy", "calibration_error": "Calibration error (ECE)"}
    panels = [(title, {"": [one[entry] for one in points]}, None) for entry, title in titles.items()]
    ks = [one["k"] for one in points]
    figure = _panels(panels, ks, "active experts k") if len(points) > 1 else None
    for ax in figure.axes if figure else ():
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(k) for k in ks], minor=False)
        ax.xaxis.set_minor_locator(NullLocator())
    return figure


def _draw_matrices(content: dict[str, Any]) -> Figure:
    """Matrices of expert against expert, a column for each of some layers."""
    count = len(content["layers"])
    shown = sorted({round(place * (count - 1) / max(min(count, LAYERS) - 1, 1)) for place in range(min(count, LAYERS))})
    size = (2.3 * len(shown) + 0.9, 2.3 * len(MATRICES) + 0.3)
    figure, axes = plt.subplots(len(MATRICES), len(shown), figsize=size, squeeze=False, layout="constrained")
    for row, (entry, title) in zip(axes, MATRICES.items(), strict=True):
        values = [np.array(content["layers"][place][entry]) for place in shown]
        others = np.concatenate([one[~np.eye(len(one), dtype=bool)] for one in values])
        low, high = float(others.min(initial=0)), float(others.max(initial=0))
        for ax, place, one in zip(row, shown, values, strict=True):
            ax.set_title(f"{title}, layer {place}", fontsize=8)
            picture = ax.imshow(np.where(np.eye(len(one), dtype=bool), np.nan, one), cmap="viridis", vmin=low, vmax=max(high, low + 1e-3))
            ax.grid(False)
            ax.set(xticks=[], yticks=[])
        figure.colorbar(picture, ax=list(row), shrink=0.85)
    return figure
