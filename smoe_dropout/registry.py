"""Names of routers, expert backends, methods and surgery, each with the place of its code, which is imported when first used.

A new one is one file and one line here. Official names (of the paper's own code) are accepted as aliases.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

ROUTERS: dict[str, str] = {
    "random": "smoe_dropout.routers:RandomRouter",
    "learned": "smoe_dropout.routers:LearnedRouter",
    "none": "smoe_dropout.routers:NoRouter",
    "hash": "smoe_dropout.routers.hash:HashRouter",
    "uniform": "smoe_dropout.routers.uniform:UniformRouter",
    "logit_drop": "smoe_dropout.routers.logit_drop:LogitDropRouter",
    "dense_to_sparse": "smoe_dropout.routers.dense_to_sparse:DenseToSparseRouter",
    "noisy_top_k": "smoe_dropout.routers.noisy_top_k:NoisyTopKRouter",
}

# the official code's gate names; its gates without a balance loss say so by setting it to 0
ROUTER_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "CustomNaiveGate": ("random", {}),
    "NaiveGate": ("learned", {"balance_loss": 0.0}),
    "CustomNaiveGate_Balance": ("learned", {}),
    "balanced": ("learned", {}),
    "CustomHashGate": ("hash", {}),
    "CustomRandomGate": ("uniform", {}),
    "CustomDropGate": ("logit_drop", {"balance_loss": 0.0}),
    "CustomDTSGate": ("dense_to_sparse", {"balance_loss": 0.0}),
    "NoisyGate": ("noisy_top_k", {"balance_loss": 0.0}),
}

BACKENDS: dict[str, str] = {
    "reference": "smoe_dropout.experts.reference",
    "sorted": "smoe_dropout.experts.sorted",
    "masked": "smoe_dropout.experts.masked",
    "few": "smoe_dropout.experts.few",
    "grouped": "smoe_dropout.experts.grouped",
    "fused": "smoe_dropout.experts.fused",
    "fastmoe": "smoe_dropout.experts.fastmoe",
}

# flags of the official scripts that name no method mean the first one here that they spell out
METHODS: dict[str, str] = {
    "smoe_dropout": "smoe_dropout.methods.smoe_dropout:METHOD",
    "smoe": "smoe_dropout.methods.smoe:METHOD",
    "dense_dropout": "smoe_dropout.methods.dense_dropout:METHOD",
    "dense": "smoe_dropout.methods.dense:METHOD",
    "elastic": "smoe_dropout.methods.elastic:METHOD",
    "sandwich": "smoe_dropout.methods.sandwich:METHOD",
    "thor": "smoe_dropout.methods.thor:METHOD",
    "competesmoe": "smoe_dropout.methods.competesmoe:METHOD",
    "momentumsmoe": "smoe_dropout.methods.momentumsmoe:METHOD",
    "similarity": "smoe_dropout.methods.similarity:METHOD",
    "attention": "smoe_dropout.methods.attention:METHOD",
    "concrete_dropout": "smoe_dropout.methods.concrete_dropout:METHOD",
    "dropblock": "smoe_dropout.methods.dropblock:METHOD",
    "block_dropout": "smoe_dropout.methods.block_dropout:METHOD",
}

# operations on trained models
SURGERIES: dict[str, str] = {
    "merge": "smoe_dropout.surgery.merging",
    "uncurl": "smoe_dropout.surgery.uncurl",
    "slim": "smoe_dropout.surgery.slimming",
    "drop": "smoe_dropout.surgery.dropping",
    "average": "smoe_dropout.surgery.averaging",
}


def unknown(kind: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The sentence for a name that is not known: the nearest ones, or all of them."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"unknown {kind} {name!r}; " + (f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}")


def load(registry: Mapping[str, str], kind: str, name: str) -> Any:
    """The object, or the module, registered under `name`. KeyError with the nearest names if there is none."""
    if name not in registry:
        raise KeyError(unknown(kind, name, registry))
    module, _, attribute = registry[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def canonical_router(name: str) -> tuple[str, dict[str, Any]]:
    """Our name of a router given by ours or by the official one, and the configuration the official name implies."""
    return ROUTER_ALIASES.get(name, (name, {}))
