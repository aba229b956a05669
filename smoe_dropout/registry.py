"""Names of routers, backends, methods, hosts, integrations and surgery methods, with the place of their code, imported on first use.

To add one, write a file and add a line here. The official code's router names are accepted as aliases.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

PACKAGE = __package__  # also the key under which a transformers model's configuration describes the experts

ROUTERS: dict[str, str] = {
    "random": "smoe_dropout.routers:RandomRouter",
    "learned": "smoe_dropout.routers:LearnedRouter",
    "none": "smoe_dropout.routers:NoRouter",
    "hash": "smoe_dropout.routers.hash:HashRouter",
    "uniform": "smoe_dropout.routers.uniform:UniformRouter",
    "logit_drop": "smoe_dropout.routers.logit_drop:LogitDropRouter",
    "dense_to_sparse": "smoe_dropout.routers.dense_to_sparse:DenseToSparseRouter",
    "noisy_top_k": "smoe_dropout.routers.noisy_top_k:NoisyTopKRouter",
    "scored": "smoe_dropout.routers.scored:ScoredRouter",
    "representative": "smoe_dropout.routers.representative:RepresentativeRouter",
    "mlp": "smoe_dropout.routers.mlp:MLPRouter",
    "all_experts": "smoe_dropout.routers.all_experts:AllExpertsRouter",
    "fixed": "smoe_dropout.routers.fixed:FixedRouter",
    "deepseek": "smoe_dropout.routers.deepseek:DeepSeekRouter",
    "sigma_moe": "smoe_dropout.routers.sigma_moe:SigmaMoERouter",
    "xmoe": "smoe_dropout.routers.xmoe:XMoERouter",
    "remoe": "smoe_dropout.routers.remoe:ReMoERouter",
    "z_loss": "smoe_dropout.routers.z_loss:ZLossRouter",
    "top_p": "smoe_dropout.routers.top_p:TopPRouter",
    "hyper_router": "smoe_dropout.routers.hyper_router:HyperRouter",
    "expert_choice": "smoe_dropout.routers.expert_choice:ExpertChoiceRouter",
    "stable_moe": "smoe_dropout.routers.stable_moe:StableMoERouter",
    "adamoe": "smoe_dropout.routers.adamoe:AdaMoERouter",
    "self_routing": "smoe_dropout.routers.self_routing:SelfRouter",
}

AT_1 = {"max_temp": 1.0, "min_temp": 1.0}  # the official training lowers the temperature of CustomDTSGate alone

# the official code's gate names, with the settings and options that they imply; without --load_balance no official gate has a balance loss
ROUTER_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "CustomNaiveGate": ("random", {}),
    "NaiveGate": ("learned", {"balance_loss": 0.0}),
    "CustomNaiveGate_Balance": ("learned", {"balance_loss": 0.0}),  # unless --load_balance
    "balanced": ("learned", {}),
    "CustomHashGate": ("hash", {}),
    "CustomRandomGate": ("uniform", {}),
    "CustomDropGate": ("logit_drop", {"balance_loss": 0.0}),
    "CustomRandomGate_Dense": ("fixed", {}),
    "CustomDenseGate": ("all_experts", {}),
    "CustomDTSGate": ("dense_to_sparse", {"balance_loss": 0.0}),
    "CustomDTSGate_softmax": ("dense_to_sparse", {"balance_loss": 0.0, "options": {"normalise": False, **AT_1}}),
    "CustomDTSRandomGate": ("dense_to_sparse", {"balance_loss": 0.0, "options": {"assign": "random", **AT_1}}),
    "CustomDTSRandomGate_softmax": ("dense_to_sparse", {"balance_loss": 0.0, "options": {"assign": "random", "normalise": False, **AT_1}}),
    "NoisyGate": ("noisy_top_k", {"balance_loss": 0.0, "options": {"noise_epsilon": 0.01, "gate_init": "kaiming"}}),
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

# official flags without a method name select the first method here whose flags they match
METHODS: dict[str, str] = {
    "smoe_dropout": "smoe_dropout.methods.smoe_dropout:METHOD",
    "smoe": "smoe_dropout.methods.smoe:METHOD",
    "dense_dropout": "smoe_dropout.methods.dense_dropout:METHOD",
    "dense": "smoe_dropout.methods.dense:METHOD",
    "elastic": "smoe_dropout.methods.elastic:METHOD",
    "sandwich": "smoe_dropout.methods.sandwich:METHOD",
    "matryoshka": "smoe_dropout.methods.matryoshka:METHOD",
    "moe_plus_plus": "smoe_dropout.methods.moe_plus_plus:METHOD",
    "thor": "smoe_dropout.methods.thor:METHOD",
    "competesmoe": "smoe_dropout.methods.competesmoe:METHOD",
    "competesmoe2": "smoe_dropout.methods.competesmoe2:METHOD",
    "momentumsmoe": "smoe_dropout.methods.momentumsmoe:METHOD",
    "similarity": "smoe_dropout.methods.similarity:METHOD",
    "attention": "smoe_dropout.methods.attention:METHOD",
    "concrete_dropout": "smoe_dropout.methods.concrete_dropout:METHOD",
    "dropblock": "smoe_dropout.methods.dropblock:METHOD",
    "block_dropout": "smoe_dropout.methods.block_dropout:METHOD",
}

# modules with find(model) -> list[Site], for feed-forward networks that are found by neither patterns nor structure
HOSTS: dict[str, str] = {
    "torch_layers": "smoe_dropout.hosts.torch_layers",
}

# layouts of feed-forward networks: names of the linear maps in a module, gated ones with `gate`. Other names are found, too, by what a
# module computes; an entry is needed for one that is not part of a stack of layers, and for maps that lie deeper in a block
PATTERNS: dict[str, dict[str, str]] = {
    "bert": {"up": "intermediate.dense", "down": "output.dense"},
    "albert": {"up": "ffn", "down": "ffn_output"},
    "bart": {"up": "fc1", "down": "fc2"},
    "gpt2": {"up": "c_fc", "down": "c_proj"},
    "gpt_neox": {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    "gptj": {"up": "fc_in", "down": "fc_out"},
    "distilbert": {"up": "lin1", "down": "lin2"},
    "t5": {"up": "wi", "down": "wo"},
    "t5_gated": {"gate": "wi_0", "up": "wi_1", "down": "wo"},
    "modernbert": {"up": "Wi", "down": "Wo"},
    "llama": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "nemotron": {"up": "up_proj", "down": "down_proj"},
    "phi3": {"up": "gate_up_proj", "down": "down_proj"},
    "wav2vec2": {"up": "intermediate_dense", "down": "output_dense"},
    "xlnet": {"up": "layer_1", "down": "layer_2"},
    "convnext": {"up": "pwconv1", "down": "pwconv2"},
}

# by imported package: modules with integrate(model, config), called at the end of `moefy`
INTEGRATIONS: dict[str, str] = {
    "transformers": "smoe_dropout.hf.integration",
}

# orders in which the neurons of trained networks are dealt to experts
CUTS: dict[str, str] = {
    "contiguous": "smoe_dropout.cuts.contiguous",
    "random": "smoe_dropout.cuts.random",
    "weights": "smoe_dropout.cuts.weights",
    "coactivation": "smoe_dropout.cuts.coactivation",
}

# operations on trained models
SURGERIES: dict[str, str] = {
    "merge": "smoe_dropout.surgery.merging",
    "uncurl": "smoe_dropout.surgery.uncurl",
    "keep_best": "smoe_dropout.surgery.keep_best",
    "drop": "smoe_dropout.surgery.dropping",
    "average": "smoe_dropout.surgery.averaging",
    "reap": "smoe_dropout.surgery.reap",
    "hc_smoe": "smoe_dropout.surgery.hc_smoe",
}


def unknown(kind: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Error message for an unknown name, with the closest known names, or all of them if none is close."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"unknown {kind} {name!r}; " + (f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}")


def load(registry: Mapping[str, str], kind: str, name: str) -> Any:
    """Import the object or module registered under `name`. KeyError with the closest names if there is none."""
    if name not in registry:
        raise KeyError(unknown(kind, name, registry))
    module, _, attribute = registry[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def canonical_router(name: str) -> tuple[str, dict[str, Any]]:
    """Registered name of a router given by either name, and the settings that an official name implies."""
    return ROUTER_ALIASES.get(name, (name, {}))
