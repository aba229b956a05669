"""Configuration of MoE layers, validated on construction. Does not import torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

from smoe_dropout.arguments import LARGEST, is_finite, plain, shown, too_large
from smoe_dropout.files import parse_json, read_json
from smoe_dropout.options import ConfigError, earlier_options
from smoe_dropout.registry import BACKENDS, CUTS, METHODS, ROUTER_ALIASES, ROUTERS, canonical_router, load, unknown

GateWeight = Literal["softmax", "pre_softmax", "sigmoid", "uniform", "unit"]
OutputScale = Literal["mean", "dense"]
ExpertInit = Literal["fresh", "split", "copy"]


@dataclass(frozen=True)
class SMoEConfig:
    """Settings of the MoE layers of one model.

    num_experts: E.
    top_k: k, experts active per token, 1..E; `set_top_k` changes it later.
    d_expert: hidden width of one expert; None divides the FFN width by E (paper section 3.1: 8192 = 16 x 512).
    router: a name in `registry.ROUTERS`, or one of the official code's names.
    freeze_router: None uses the router's default (random: frozen, learned: trained).
    gate_weight: "softmax" over the k chosen logits (paper section 3.1), which is always 1 at k = 1; "pre_softmax" over all E logits before
        k are chosen, not renormalised (Switch Transformers, arXiv 2101.03961, eq. 2); "sigmoid" of each chosen logit, not renormalised (the
        score of DeepSeek-V3, arXiv 2412.19437, eq. 15); "uniform", 1/k; or "unit", 1, times a factor of the router for each k, which is 1
        at first and always at k = E: the layer is the sum of the chosen experts. A trained router learns from the task at every k with
        "pre_softmax" and "sigmoid", from k = 2 on with "softmax", and never with "uniform" and "unit".
    output_scale: "mean" uses the gate weights unscaled, as the official code does: the layer is a weighted mean of experts. "dense"
        multiplies by E, so that k = E gives the sum that a dense FFN is, and k < E is inverted dropout over experts.
    expert_init: "fresh" N(0, init_std^2), as in the official code; "split" splits the model's FFN into E experts; "copy" gives every expert
        the whole FFN (sparse upcycling, arXiv 2212.05055).
    cut: with "split", a name in `registry.CUTS`: which neurons form an expert together. "contiguous": neighbours.
    shared_experts: S, experts 0..S-1 that the router chooses first for every token; with "split" they get the most important neurons.
    balance_loss: coefficient of the Switch load-balance loss; None uses the router's default (learned: 0.01).
    layers: indices of the FFNs to convert, counted from 0 or, if negative, from the end; None: all. A second conversion counts the
        model's original FFNs, so that those converted before keep their indices.
    experts_by_layer: number of experts of each MoE layer, if they differ; num_experts is the largest. Requires d_expert and
        expert_init = "fresh". A layer with fewer than k experts activates all of them.
    top_k_by_layer: k of each MoE layer, if they differ by more than that; top_k is the largest. `set_top_k` changes it, too.
    sites: glob patterns of the dotted names of FFN modules, such as "encoder.layers.*.mlp", for architectures without a host or to
        override the hosts; `layers` then counts the matching modules.
    backend: "auto" or a name in `registry.BACKENDS`; all backends give the same result.
    init_std: standard deviation of fresh expert weights and of the router's weights.
    method: a name in `registry.METHODS` whose layer routes or combines differently; None: the plain layer.
    options: options of the method and the router, by name; see their files.
    expert_rank: rank of U V in W = U V + S for experts compressed by `surgery.compression`; None: not compressed.
    sparse_share: with expert_rank, the fraction of hidden units in S.
    adopted: name of the architecture whose own experts and routers the layers keep, set by `adopt`; None: the layers replace dense FFNs.

    Raises ConfigError listing all mistakes.
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
    top_k_by_layer: tuple[int, ...] | None = None
    sites: str | tuple[str, ...] | None = None
    backend: str = "auto"
    init_std: float = 0.02
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    expert_rank: int | None = None
    sparse_share: float = 1.0
    adopted: str | None = None
    cut: str = "contiguous"
    shared_experts: int = 0

    def __post_init__(self):
        router, implied = canonical_router(self.router) if isinstance(self.router, str) else (self.router, {})
        object.__setattr__(self, "router", router)
        if self.balance_loss is None and "balance_loss" in implied:
            object.__setattr__(self, "balance_loss", implied["balance_loss"])
        if "options" in implied and isinstance(self.options, Mapping):
            object.__setattr__(self, "options", {**implied["options"], **self.options})
        for entry in fields(self):
            if entry.name != "options":
                object.__setattr__(self, entry.name, _plain(getattr(self, entry.name)))
        mistakes = self.mistakes()
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @classmethod
    def exact(cls, num_experts: int = 16, **changes: Any) -> "SMoEConfig":
        """Configuration whose experts compute the model's own FFNs: split into E experts, all active, with uniform weights.

        The converted model equals the dense one up to rounding; smaller k are approximations. changes: further fields. The random router
        stays frozen by default; one that is trained gets its gradient from the balance loss only, as the weights do not depend on it.
        """
        settings = {"top_k": num_experts, "expert_init": "split", "gate_weight": "uniform", "output_scale": "dense"}
        return cls(num_experts=num_experts, **{**settings, **changes})

    def mistakes(self) -> list[str]:
        """One sentence for each invalid field."""
        found, E = [], self.num_experts
        if not _is_count(E):
            found.append(f"num_experts = {shown(E)} must be a whole number of at least 1{too_large(E)}")
        if not _is_count(self.top_k) or (_is_count(E) and self.top_k > E):
            found.append(f"top_k = {shown(self.top_k)} must be a whole number from 1 to num_experts = {shown(E)}")
        if self.d_expert is not None and not _is_count(self.d_expert):
            found.append(f"d_expert = {shown(self.d_expert)} must be a whole number of at least 1{too_large(self.d_expert)}, or None")
        names = {"router": [*ROUTERS, *ROUTER_ALIASES], "backend": ["auto", *BACKENDS], "method": [*METHODS], "cut": [*CUTS]}
        for kind, known in names.items():
            if (given := getattr(self, kind)) not in known and not (kind == "method" and given is None):
                found.append(name_mistake(kind, given, known))
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            found.append(f"options = {self.options!r} must be a mapping from names to values")
        if not _is_count(self.shared_experts, least=0) or (_is_count(E) and self.shared_experts >= E):
            found.append(f"shared_experts = {shown(self.shared_experts)} must be a whole number from 0 to below num_experts = {shown(E)}")
        if self.freeze_router not in (None, True, False):
            found.append(f"freeze_router = {self.freeze_router!r} must be True, False or None")
        for name, choices in (("gate_weight", GateWeight), ("output_scale", OutputScale), ("expert_init", ExpertInit)):
            if getattr(self, name) not in get_args(choices):
                found.append(unknown(name, str(getattr(self, name)), list(get_args(choices))))
        if self.balance_loss is not None and not (is_finite(self.balance_loss) and self.balance_loss >= 0):
            found.append(f"balance_loss = {shown(self.balance_loss)} must be a number and not negative")
        if not (is_finite(self.init_std) and self.init_std > 0):
            found.append(f"init_std = {shown(self.init_std)} must be a positive number")
        if self.layers is not None:
            found += layer_mistakes(self.layers)
        if self.experts_by_layer is not None:
            found += self._count_mistakes(self.experts_by_layer)
        if self.top_k_by_layer is not None:
            found += self._k_mistakes(self.top_k_by_layer)
        if self.sites is not None:
            found += site_mistakes(self.sites)
        if self.expert_rank is not None and not _is_count(self.expert_rank):
            found.append(
                f"expert_rank = {shown(self.expert_rank)} must be a whole number of at least 1{too_large(self.expert_rank)}, or None"
            )
        if not (is_finite(self.sparse_share) and 0 < self.sparse_share <= 1):
            found.append(f"sparse_share = {shown(self.sparse_share)} must be a number above 0 and at most 1")
        if self.expert_rank is None and self.sparse_share != 1:
            found.append(f"sparse_share = {self.sparse_share!r} has no effect without expert_rank: leave it out")
        if self.expert_rank is not None and self.expert_init != "fresh":
            found.append("expert_rank requires expert_init = 'fresh': use surgery to compress the experts of a trained model")
        if self.expert_init == "copy" and self.output_scale == "dense":
            found.append("expert_init = 'copy' gives E whole FFNs, whose sum is E times the dense output: use output_scale = 'mean'")
        if self.gate_weight == "unit" and (self.expert_init == "copy" or self.output_scale == "dense"):
            name = "expert_init" if self.expert_init == "copy" else "output_scale"
            found.append(f"gate_weight = 'unit' sums the experts, which {name} = {getattr(self, name)!r} makes too large: leave that out")
        if self.expert_init != "fresh" and self.d_expert is not None:
            found.append(f"d_expert = {self.d_expert} follows from the model's FFN with expert_init = {self.expert_init!r}: leave it out")
        if self.adopted is not None:
            found += self._adoption_mistakes()
        return found

    def _adoption_mistakes(self) -> list[str]:
        """One sentence for each setting that does not apply to adopted experts."""
        fixed = {"router": "scored", "gate_weight": "softmax", "output_scale": "mean", "expert_init": "fresh"}
        fixed |= dict.fromkeys(("layers", "sites", "method"))
        return [
            f"{name} = {getattr(self, name)!r} cannot be combined with adopted = {self.adopted!r}, which keeps the model's own routing"
            for name, value in fixed.items()
            if getattr(self, name) != value
        ]

    def _count_mistakes(self, counts: tuple[int, ...]) -> list[str]:
        """One sentence for each mistake in `experts_by_layer`."""
        if not isinstance(counts, tuple) or not counts or not all(map(_is_count, counts)):
            return [f"experts_by_layer = {counts!r} must be a list of whole numbers of at least 1, or None"]
        found = []
        if max(counts) != self.num_experts:
            found.append(f"num_experts = {self.num_experts!r} must be the largest of experts_by_layer = {counts}")
        if isinstance(self.layers, tuple) and len(self.layers) != len(counts):
            found.append(f"experts_by_layer = {counts} must give a number for each of the {len(self.layers)} layers")
        if self.expert_init != "fresh":
            found.append(f"expert_init = {self.expert_init!r} cannot be combined with experts_by_layer: use 'fresh'")
        elif self.d_expert is None:
            found.append("experts_by_layer requires d_expert: the width of an expert does not follow if their numbers differ")
        return found

    def _k_mistakes(self, ks: tuple[int, ...]) -> list[str]:
        """One sentence for each mistake in `top_k_by_layer`."""
        if not isinstance(ks, tuple) or not ks or not all(map(_is_count, ks)):
            return [f"top_k_by_layer = {ks!r} must be a list of whole numbers of at least 1, or None"]
        found = []
        if max(ks) != self.top_k:
            found.append(f"top_k = {self.top_k!r} must be the largest of top_k_by_layer = {ks}")
        if isinstance(self.layers, tuple) and len(self.layers) != len(ks):
            found.append(f"top_k_by_layer = {ks} must give a number for each of the {len(self.layers)} layers")
        counts = self.experts_by_layer if isinstance(self.experts_by_layer, tuple) and all(map(_is_count, self.experts_by_layer)) else None
        if counts and (len(counts) != len(ks) or any(k > count for k, count in zip(ks, counts, strict=True))):
            found.append(f"top_k_by_layer = {ks} must give each layer at most its number of experts, experts_by_layer = {counts}")
        return found

    def require_layers(self, count: int) -> None:
        """Raise ConfigError if what differs between layers is not given for this number of MoE layers."""
        for name in ("experts_by_layer", "top_k_by_layer"):
            if (numbers := getattr(self, name)) is not None and len(numbers) != count:
                raise ConfigError(f"{name} = {numbers} must give a number for each of the {count} MoE layers")

    def of_layer(self, place: int) -> "SMoEConfig":
        """Configuration of one MoE layer, by its index among the MoE layers, with that layer's number of experts and k."""
        if self.experts_by_layer is None and self.top_k_by_layer is None:
            return self
        count = self.num_experts if self.experts_by_layer is None else self.experts_by_layer[place]
        k = self.top_k if self.top_k_by_layer is None else self.top_k_by_layer[place]
        return replace(self, num_experts=count, top_k=min(k, count), experts_by_layer=None, top_k_by_layer=None)

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SMoEConfig":
        """Inverse of `to_json`. ConfigError for invalid JSON, and for unknown or invalid fields."""
        if not isinstance(text, str | bytes):
            raise ConfigError(f"the configuration is a {type(text).__name__}, not JSON")
        return cls.from_dict(parse_json(text, "the configuration"))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SMoEConfig":
        """Build from field values. ConfigError for unknown or invalid fields."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"the configuration is a {type(values).__name__}, not the fields of one SMoEConfig")
        known = {entry.name for entry in fields(cls)}
        if foreign := sorted(set(values) - known):
            raise ConfigError(f"unknown field {', '.join(foreign)} in the configuration; known: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def stored(cls, values: dict[str, Any]) -> "SMoEConfig":
        """`from_dict` of a file's values. Options of the method that it does not have are as they were by default when it was written."""
        config = cls.from_dict(values)
        if config.method is None:
            return config
        return replace(config, options=earlier_options(load(METHODS, "method", config.method).options, config.options))


def layer_mistakes(layers: tuple[int, ...]) -> list[str]:
    """One sentence for each mistake in `layers`: not a list, empty, or with invalid or repeated indices."""
    if not isinstance(layers, tuple):
        return [f"layers = {layers!r} must be a list of layer indices, or None for all"]
    if len(layers) == 0:
        return ["layers is empty: name at least one layer, or leave it out for all"]
    found = []
    if wrong := [index for index in layers if not isinstance(index, int) or isinstance(index, bool)]:
        found.append(f"layers names {wrong[0]!r}, which is not a layer index")
    if repeated := sorted({str(index) for index in layers if layers.count(index) > 1}):
        found.append(f"layers names {', '.join(repeated)} more than once")
    return found


def name_mistake(kind: str, given: Any, known: list[str]) -> str:
    """Sentence for a router, backend or method that is not a registered name, such as the class itself."""
    if isinstance(given, str):
        return unknown(kind, given, known)
    if isinstance(given, type):
        place = f"{given.__module__}:{given.__qualname__}"
        return f"{kind} is the class {given.__name__}: register it, registry.{kind.upper()}S['name'] = {place!r}, and pass that name"
    if isinstance(name := getattr(given, "name", None), str) and name in known:
        return f"{kind} is a {type(given).__name__}: pass its name, {kind} = {name!r}"
    return f"{kind} = {given!r} must be a registered name: {', '.join(known)}"


def site_mistakes(sites: str | tuple[str, ...]) -> list[str]:
    """One sentence if `sites` is not a non-empty pattern or list of patterns."""
    patterns = (sites,) if isinstance(sites, str) else sites
    if not isinstance(patterns, tuple) or not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        return [f"sites = {sites!r} must be a pattern of module names such as 'encoder.layers.*.mlp', a list of them, or None"]
    return []


def read_configs(path: Path) -> list[SMoEConfig]:
    """The configurations in a file that `save_model` wrote, one for each call of `moefy`. ConfigError for anything else."""
    found = read_json(path)
    try:
        return [SMoEConfig.stored(values) for values in (found if isinstance(found, list) and found else [found])]
    except (TypeError, ValueError) as error:  # not a configuration
        raise ConfigError(f"{path} is damaged: {error}") from None


def _plain(value: Any) -> Any:
    """Lists and ranges as tuples, and numbers of other libraries, such as numpy's, as Python's."""
    if isinstance(value, list | tuple | range):
        return tuple(map(_plain, value))
    value = plain(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if is_finite(value) else value


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST
