"""What turns a feed-forward layer into a mixture of experts, checked when it is made. Importing this does not import torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from smoe_dropout.options import ConfigError
from smoe_dropout.registry import BACKENDS, METHODS, ROUTER_ALIASES, ROUTERS, canonical_router, unknown

GateWeight = Literal["softmax", "uniform"]
OutputScale = Literal["mean", "dense"]
ExpertInit = Literal["fresh", "split", "copy"]


@dataclass(frozen=True)
class SMoEConfig:
    """Settings of the MoE layers of one model.

    num_experts: E. top_k: k, experts active per token, 1..E; may be changed later with `set_top_k`.
    d_expert: hidden width of one expert; None divides the host's FFN width by E (paper section 3.1: 8192 = 16 x 512).
    router: a name in `registry.ROUTERS` or one of the official names.
    freeze_router: None leaves it to the router (random: frozen, learned: trained).
    gate_weight: "softmax" over the k kept logits (paper section 3.1), or "uniform" 1/k.
    output_scale: "mean" leaves the gate weights as they are (official: the layer is a weighted mean of experts); "dense" multiplies by E,
        so that k = E is the sum that the dense FFN is and k < E is inverted dropout over experts.
    expert_init: "fresh" N(0, init_std^2), the official one; "split" cuts the host's trained FFN into E experts; "copy" gives every expert
        the whole FFN (sparse upcycling, arXiv 2212.05055).
    balance_loss: coefficient of the Switch load-balance loss; None leaves it to the router (learned: 0.01).
    layers: which of the host's FFNs become experts, by index; None: all.
    experts_by_layer: numbers of experts of the MoE layers in order, where they differ; num_experts is the largest of them. Needs d_expert,
        and expert_init = "fresh". A layer with fewer than k experts has all of them active.
    sites: for an architecture that no host knows, or to overrule the hosts: which modules are FFNs, as glob patterns of their dotted names,
        "encoder.layers.*.mlp", one or several; `layers` then counts the modules found.
    backend: how experts are computed: "auto" or a name in `registry.BACKENDS`; all give the same result.
    init_std: standard deviation of fresh weights and of the router's.
    method: a name in `registry.METHODS` whose layer routes and combines in its own way; None: the plain layer.
    options: of the method and the router, by name; their files say which there are.
    expert_rank: what `surgery.compression` left: every map is U V of this rank + S; None: the map itself.
    sparse_share: with expert_rank, the share of the hidden units that S has.

    Raises ConfigError, listing all mistakes at once.
    """

    num_experts: int = 16
    top_k: int = 8
    d_expert: int | None = None
    router: str = "random"
    freeze_router: bool | None = None
    gate_weight: GateWeight = "softmax"
    output_scale: OutputScale = "mean"
    expert_init: ExpertInit = "fresh"
    balance_loss: float | None = None
    layers: tuple[int, ...] | None = None
    experts_by_layer: tuple[int, ...] | None = None
    sites: str | tuple[str, ...] | None = None
    backend: str = "auto"
    init_std: float = 0.02
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    expert_rank: int | None = None
    sparse_share: float = 1.0

    def __post_init__(self):
        router, implied = canonical_router(self.router) if isinstance(self.router, str) else (self.router, {})
        object.__setattr__(self, "router", router)
        if self.balance_loss is None and "balance_loss" in implied:
            object.__setattr__(self, "balance_loss", implied["balance_loss"])
        if isinstance(self.layers, list | range):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("sites", "experts_by_layer"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        mistakes = self.mistakes()
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def mistakes(self) -> list[str]:
        """One sentence for each field that cannot be."""
        found, E = [], self.num_experts
        if not _is_count(E):
            found.append(f"num_experts = {E!r} must be a whole number of at least 1")
        if not _is_count(self.top_k) or (_is_count(E) and self.top_k > E):
            found.append(f"top_k = {self.top_k!r} must be a whole number from 1 to num_experts = {E!r}")
        if self.d_expert is not None and not _is_count(self.d_expert):
            found.append(f"d_expert = {self.d_expert!r} must be a whole number of at least 1, or None")
        if self.router not in ROUTERS:
            found.append(unknown("router", str(self.router), [*ROUTERS, *ROUTER_ALIASES]))
        if self.backend not in ("auto", *BACKENDS):
            found.append(unknown("backend", str(self.backend), ["auto", *BACKENDS]))
        if self.method is not None and self.method not in METHODS:
            found.append(unknown("method", str(self.method), METHODS))
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            found.append(f"options = {self.options!r} must give values by name")
        if self.freeze_router not in (None, True, False):
            found.append(f"freeze_router = {self.freeze_router!r} must be True, False or None")
        for name, choices in (("gate_weight", GateWeight), ("output_scale", OutputScale), ("expert_init", ExpertInit)):
            if getattr(self, name) not in get_args(choices):
                found.append(unknown(name, str(getattr(self, name)), list(get_args(choices))))
        if self.balance_loss is not None and not (_is_finite(self.balance_loss) and self.balance_loss >= 0):
            found.append(f"balance_loss = {self.balance_loss!r} must be a number and not negative")
        if not (_is_finite(self.init_std) and self.init_std > 0):
            found.append(f"init_std = {self.init_std!r} must be a positive number")
        if self.layers is not None:
            found += layer_mistakes(self.layers)
        if self.experts_by_layer is not None:
            found += self._count_mistakes(self.experts_by_layer)
        if self.sites is not None:
            found += site_mistakes(self.sites)
        if self.expert_rank is not None and not _is_count(self.expert_rank):
            found.append(f"expert_rank = {self.expert_rank!r} must be a whole number of at least 1, or None")
        if not (_is_finite(self.sparse_share) and 0 < self.sparse_share <= 1):
            found.append(f"sparse_share = {self.sparse_share!r} must be a number above 0, and 1 at most")
        if self.expert_rank is None and self.sparse_share != 1:
            found.append(f"sparse_share = {self.sparse_share!r} means nothing without expert_rank: leave it out")
        if self.expert_rank is not None and self.expert_init != "fresh":
            found.append("expert_rank needs expert_init = 'fresh': the experts of a trained model are compressed by surgery")
        if self.expert_init == "copy" and self.output_scale == "dense":
            found.append("expert_init = 'copy' gives E whole FFNs, whose sum is E times the dense one: use output_scale = 'mean'")
        if self.expert_init != "fresh" and self.d_expert is not None:
            found.append(f"d_expert = {self.d_expert} is decided by the host's FFN with expert_init = {self.expert_init!r}: leave it out")
        return found

    def _count_mistakes(self, counts: tuple[int, ...]) -> list[str]:
        """Sentences for numbers of experts by layer that cannot be."""
        if not isinstance(counts, tuple) or not counts or not all(map(_is_count, counts)):
            return [f"experts_by_layer = {counts!r} must be a list of whole numbers of at least 1, or None"]
        found = []
        if max(counts) != self.num_experts:
            found.append(f"num_experts = {self.num_experts!r} must be the largest of experts_by_layer = {counts}")
        if isinstance(self.layers, tuple) and len(self.layers) != len(counts):
            found.append(f"experts_by_layer = {counts} must give a number for each of the {len(self.layers)} layers")
        if self.expert_init != "fresh":
            found.append(f"expert_init = {self.expert_init!r} cannot be with experts_by_layer: use 'fresh'")
        elif self.d_expert is None:
            found.append("experts_by_layer needs d_expert: layers of different numbers of experts do not say how wide one is")
        return found

    def of_layer(self, place: int) -> "SMoEConfig":
        """Of the MoE layer at this place among them, counted from 0: with its own number of experts."""
        if self.experts_by_layer is None:
            return self
        count = self.experts_by_layer[place]
        return replace(self, num_experts=count, top_k=min(self.top_k, count), experts_by_layer=None)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SMoEConfig":
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SMoEConfig":
        """Raises ConfigError for a field this version does not know."""
        known = {entry.name for entry in fields(cls)}
        if foreign := sorted(set(values) - known):
            raise ConfigError(f"unknown field {', '.join(foreign)} in the configuration; known: {', '.join(sorted(known))}")
        return cls(**values)


def layer_mistakes(layers: tuple[int, ...]) -> list[str]:
    """Sentences for what is no choice of layers: empty, negative or repeated indices, or not a list of them."""
    if not isinstance(layers, tuple):
        return [f"layers = {layers!r} must be a list of layer indices, or None for all"]
    if len(layers) == 0:
        return ["layers is empty: name at least one layer, or leave it out for all"]
    found = []
    if wrong := [index for index in layers if index != 0 and not _is_count(index)]:
        found.append(f"layers names {wrong[0]!r}, which is no layer index")
    if repeated := sorted({str(index) for index in layers if layers.count(index) > 1}):
        found.append(f"layers names {', '.join(repeated)} more than once")
    return found


def site_mistakes(sites: str | tuple[str, ...]) -> list[str]:
    """Sentences for what is no choice of modules: not a pattern or a list of them, or an empty one."""
    patterns = (sites,) if isinstance(sites, str) else sites
    if not isinstance(patterns, tuple) or not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        return [f"sites = {sites!r} must be a pattern of module names such as 'encoder.layers.*.mlp', a list of them, or None"]
    return []


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
