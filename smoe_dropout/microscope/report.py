"""Report of the microscope: numbers by layer and by k, and the faults that they show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

DEAD = 0.01  # of the even load, below which an expert counts as dead
EQUAL = 0.99  # mean cosine of outputs from which experts count as equal
COLLAPSED = 0.1  # of the way from k experts in use to E, below which a router counts as collapsed
LAST = "loss_without_first"
LISTED = 8  # experts that a sentence names


@dataclass(frozen=True)
class LayerReport:
    """Measurements of one MoE layer, as docs/microscope.md defines them; None for what does not exist.

    experts: E. shared: of them, chosen by every token; the routing's measures are of the others, and experts are numbered from 0 with the
    shared ones first. mean_k: routed experts per token. load: fraction of the assignments by routed expert, summing to 1. dead: numbers of
    experts with less than 1 % of the even load. confidence, margin: None for a router without logits. co_activation: N_ij / N_i of routed
    experts. cosine, cka: of the outputs of each two experts; `mean_cosine` and `mean_cka` are their means. effective_rank: of the outputs,
    weight_rank: of the weights, with a row per expert. loss_without_first: rise of the model's loss if tokens lose their first expert here.
    """

    name: str
    experts: int
    shared: int
    mean_k: float
    load: list[float]
    load_entropy: float
    load_variation: float
    load_max: float
    dead: list[int]
    confidence: float | None
    margin: float | None
    co_activation: list[list[float]]
    cosine: list[list[float]]
    cka: list[list[float]]
    mean_cosine: float | None
    mean_cka: float | None
    effective_rank: float
    weight_rank: float
    loss_without_first: float | None = None

    @property
    def dead_share(self) -> float:
        """Dead experts as a fraction of the routed ones."""
        return len(self.dead) / len(self.load)

    @property
    def equal(self) -> list[tuple[int, ...]]:
        """Groups of experts whose outputs are equal: each is linked to another one by a mean cosine of 0.99 or more."""
        near_EE = torch.tensor(self.cosine) >= EQUAL
        for _ in range(self.experts.bit_length()):  # squared, until links of links are links
            near_EE = near_EE.float() @ near_EE.float() > 0
        groups = dict.fromkeys(tuple(row.nonzero()[:, 0].tolist()) for row in near_EE)
        return [group for group in groups if len(group) > 1]

    @property
    def in_use(self) -> float:
        """exp of the entropy of the load: the number of experts of which even use has this entropy."""
        return float(torch.special.entr(torch.tensor(self.load, dtype=torch.float64)).sum().exp())

    @property
    def collapsed(self) -> bool:
        """Return whether nearly all tokens have the same k experts."""
        return self.mean_k < len(self.load) and self.in_use < self.mean_k + COLLAPSED * (len(self.load) - self.mean_k)


@dataclass(frozen=True)
class Quality:
    """The model's predictions at one k, by layer name if it differs: mean loss in nats, accuracy, expected calibration error."""

    k: int | dict[str, int]
    loss: float | None
    accuracy: float | None
    calibration_error: float | None


@dataclass(frozen=True)
class Report:
    """Account of a model's MoE layers on a text; `str` gives it as a table.

    k: active experts, by layer name if they differ. tokens: that were counted, and sampled: those for which all experts were compared.
    routes: for each layer the routed experts of each token in the router's order, int16 [N, K], -1 for none, for `fluctuation` and
    `saturation`.
    """

    k: int | dict[str, int]
    tokens: int
    sampled: int
    layers: tuple[LayerReport, ...]
    by_k: tuple[Quality, ...]
    routes: tuple[Tensor, ...] = field(repr=False)

    @property
    def findings(self) -> list[str]:
        """Faults, a sentence each: dead experts, equal experts, collapsed routers."""
        return [f"{layer.name}: {sentence}" for layer in self.layers for sentence in _faults(layer)]

    def mean(self, name: str) -> float | None:
        """Mean over layers of a measure, of those that have it."""
        values = [value for layer in self.layers if (value := getattr(layer, name)) is not None]
        return sum(values) / len(values) if values else None

    def values(self) -> dict[str, Any]:
        """Everything but the routes as values of JSON, matrices rounded to five digits."""
        found = {name: getattr(self, name) for name in ("k", "tokens", "sampled")}
        layers = [
            {name: _rounded(value) if isinstance(value, list) else value for name, value in asdict(layer).items()} for layer in self.layers
        ]
        return found | {"findings": self.findings, "layers": layers, "by_k": [asdict(quality) for quality in self.by_k]}

    def __str__(self) -> str:
        columns = ("load_entropy", "load_max", "dead", "confidence", "margin", "mean_cosine", "mean_cka", "effective_rank")
        columns += (LAST,)
        rows = [("layer", *columns)] + [(layer.name, *(_cell(layer, name) for name in columns)) for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"k = {self.k}, {self.tokens:,} tokens", *lines, *self.findings])


def _faults(layer: LayerReport) -> Iterator[str]:
    if layer.dead:
        yield f"{_named(layer.dead)} of {layer.experts} {'is' if len(layer.dead) == 1 else 'are'} dead (below 1 % of the even load)"
    for group in layer.equal:
        yield f"{_named(group)} compute the same (mean cosine of their outputs at least {EQUAL})"
    if layer.collapsed:
        used = f"{layer.in_use:.1f} of {len(layer.load)} experts are in use at k = {layer.mean_k:.3g}"
        yield f"the router has collapsed: nearly all tokens have the same experts ({used})"


def _named(experts: list[int] | tuple[int, ...]) -> str:
    more = f" and {len(experts) - LISTED} more" * (len(experts) > LISTED)
    return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts[:LISTED]))}{more}"


def _cell(layer: LayerReport, name: str) -> str:
    value = getattr(layer, name)
    return "–" if value is None else str(len(value)) if isinstance(value, list) else f"{value:{'+' * (name == LAST)}.3f}"


def _rounded(values: list) -> list:
    return [_rounded(value) if isinstance(value, list) else round(value, 5) for value in values]
