"""Gate weights match their equations, routers say when the task trains them, and a model tells when it does not or cannot route."""

import copy
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.selection import GateMass, TokenK
from tests.library.test_library import Net
from tests.library.test_routers import D, linear, numpy, router, softmax, switch, tokens

WEIGHTS = {
    "softmax": lambda logits, chosen: np.where(chosen, np.exp(logits), 0) / np.where(chosen, np.exp(logits), 0).sum(1, keepdims=True),
    "pre_softmax": lambda logits, chosen: softmax(logits) * chosen,
    "sigmoid": lambda logits, chosen: chosen / (1 + np.exp(-logits)),
    "uniform": lambda logits, chosen: chosen / chosen.sum(1, keepdims=True),
}
KS = {"one": 1, "three": 3, "all": 6, "each": TokenK(1 + torch.arange(40) % 4, 4), "mass": GateMass(0.6, 1, 5)}


def number(k, probability: np.ndarray) -> np.ndarray:
    """Experts per token [N]."""
    if isinstance(k, GateMass):
        descending = -np.sort(-probability)
        return np.clip((descending.cumsum(1) - descending < k.p).sum(1), k.smallest, k.largest)
    return k.values.numpy() if isinstance(k, TokenK) else np.full(len(probability), k)


@pytest.mark.parametrize(("name", "gate_weight"), list(itertools.product(("learned", "logit_drop", "noisy_top_k", "uniform"), WEIGHTS)))
def test_gate_weights(name, gate_weight):
    gate, x = router(name, gate_weight=gate_weight).eval(), tokens()
    for k in KS.values():
        torch.manual_seed(3)
        routing = gate(x, k)
        torch.manual_seed(3)
        logits = numpy(torch.rand(40, 6)) if name == "uniform" else linear(gate, x)
        p = WEIGHTS["sigmoid"](logits, np.ones(1)) if gate_weight == "sigmoid" else softmax(logits)
        ranks = (-logits).argsort(1).argsort(1)
        expected = WEIGHTS[gate_weight](logits, ranks < number(k, p / p.sum(1, keepdims=True))[:, None])
        found = torch.zeros(40, 7, dtype=torch.float64).scatter(1, routing.indices_NK % 7, routing.weights_NK.double())  # none: column 6
        np.testing.assert_allclose(found.detach()[:, :6], expected, rtol=2e-5, atol=1e-7)
        assert not found[:, 6].any()


@pytest.mark.parametrize(("gate_weight", "score"), [("pre_softmax", "softmax"), ("sigmoid", "sigmoid")])
def test_gate_weights_are_those_of_published_models(gate_weight, score):
    """Losses and noise included: Switch Transformers and DeepSeek-V3 without division by the sum."""
    gate, x = router("learned", gate_weight=gate_weight), tokens()
    published = router("scored", options={"score": score, "normalise": False})
    published.load_state_dict(gate.state_dict())
    for ours, theirs in zip(gate(x, 2)[:3], published(x, 2)[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    noisy = router("noisy_top_k", gate_weight="pre_softmax")
    assert (noisy(x, 6).weights_NK.sum(1) - 1).abs().max() < 1e-5 and noisy(x, 2).weights_NK.sum(1).max() < 1
    logits = linear(gate, x)
    p = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits)
    assert gate(x, 2).losses["balance"].item() == pytest.approx(0.01 * switch(np.log(p), gate(x, 2).indices_NK.numpy()), rel=1e-5)
    with pytest.raises(sd.ConfigError, match="no logits_NE"):
        router("learned", gate_weight="pre_softmax").weigh(torch.ones(2, 1))


def gates() -> list[tuple[str, dict]]:
    """Every router with each of the gate weights that it takes."""
    own = [("scored", {"options": {"normalise": value, "scale": 2.5}}) for value in (True, False)]
    named = [(name, load(ROUTERS, "router", name)) for name in ROUTERS if name not in ("none", "scored")]
    return own + [(name, {"gate_weight": one}) for name, kind in named for one in (WEIGHTS if "gate_weight" in kind.uses else ["softmax"])]


@pytest.mark.parametrize(("name", "settings"), gates(), ids=str)
def test_routers_know_whether_the_task_trains_them(name, settings):
    gate = router(name, freeze_router=False, **settings).train()
    if not list(gate.parameters()):
        return
    for k in (1, 2, 6):
        gate.zero_grad()
        routing = gate(tokens(), k)
        weights = routing.weights_NK * torch.arange(1.0, 1 + len(routing.weights_NK))[:, None] * (1 + routing.indices_NK)
        if weights.requires_grad:
            weights.sum().backward()
        gradient = max(0.0 if one.grad is None else one.grad.abs().max().item() for one in gate.parameters())
        assert (gradient > 1e-3) == gate.learns_from_task(k), (k, gradient)


UNTRAINED = {
    "k": (
        {"router": "learned", "top_k": 1},
        "at k = 1 the gate .*, only the balance loss does: use gate_weight = 'pre_softmax' or 'sigmoid'",
    ),
    "uniform": ({"router": "learned", "gate_weight": "uniform", "balance_loss": 0.0}, "are all equal, and there is no balance loss"),
    "thawed": ({"router": "random", "freeze_router": False, "top_k": 1}, "or freeze the routers"),
    "scored": ({"router": "scored", "top_k": 1}, "use the option normalise = False, a larger k,"),
    "noisy": ({"router": "noisy_top_k", "top_k": 1}, "only the balance loss"),
}
TRAINED = {
    "k": {"router": "learned"},
    "frozen": {"top_k": 1},
    "frozen_uniform": {"gate_weight": "uniform"},
    "pre_softmax": {"router": "learned", "top_k": 1, "gate_weight": "pre_softmax"},
    "sigmoid": {"router": "learned", "top_k": 1, "gate_weight": "sigmoid"},
    "scored": {"router": "scored", "top_k": 1, "options": {"normalise": False}},
    "dense_to_sparse": {"router": "dense_to_sparse", "top_k": 1},
    "hash": {"router": "hash", "top_k": 1},
    "one": {"router": "learned", "num_experts": 1, "top_k": 1},
    "distilled": {"router": "learned", "method": "competesmoe", "top_k": 1},
    "none": {"router": "none", "method": "thor", "top_k": 1},
}


class Embedded(Net):
    """With token ids as input, for the routers that need them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, D)

    def forward(self, ids):
        return super().forward(self.embedding(ids))


def sparse(**settings) -> nn.Module:
    torch.manual_seed(0)
    return sd.moefy(Embedded(), sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, **settings}))


def warned(model: nn.Module) -> list[str]:
    """Warnings of a pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.arange(10).view(2, 5))
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(("settings", "words"), UNTRAINED.values(), ids=UNTRAINED)
def test_router_that_the_task_does_not_train_is_named_once(settings, words):
    model = sparse(**settings)
    assert warned(model.eval()) == []
    with torch.no_grad():
        assert warned(model.train()) == []
    (sentence,) = warned(model)
    assert re.fullmatch(f"the task does not train the router of 'layers.0', .*{words}.*", sentence)
    assert warned(model) == []


@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)
def test_router_that_the_task_trains_or_that_is_frozen_is_not_named(settings):
    assert warned(sparse(**settings).train()) == []


def test_later_k_and_later_training():
    """The k of a context, a list by layer, and routers that are unfrozen."""
    model = sparse(router="learned").train()
    assert warned(model) == []
    with sd.top_k(model, torch.tensor([1, 2])):
        assert warned(model) == []
    with sd.top_k(model, [2, 1]):
        assert "'layers.1'" in warned(model)[0]
    model = sparse(top_k=1).train()
    assert warned(model) == []
    sd.freeze_routers(model, False)
    assert "'layers.0'" in warned(model)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight", "bias", "correction"])
def test_router_weights_that_are_not_finite_are_named(name, value):
    model = sparse(router="scored", options={"correction": True}).eval()
    assert warned(model) == []
    state, words = copy.deepcopy(model.state_dict()), f"'router.{name}' of the MoE layer 'layers.1' has values that are NaN or infinite"
    state[f"layers.1.router.{name}"].view(-1)[2] = value
    model.load_state_dict(state)
    for broken in (model, copy.deepcopy(model), nn.Sequential(model)):
        for _ in range(2):
            with pytest.raises(sd.ConfigError, match=words):
                broken(torch.arange(10).view(2, 5))
    state[f"layers.1.router.{name}"].view(-1)[2] = 0.0
    model.layers[1].load_state_dict({key.removeprefix("layers.1."): state[key] for key in state if key.startswith("layers.1.")})
    assert warned(model) == []
    model.layers[0].router.weight.data[0, 0] = value  # a value that a step of training made is not looked for in every pass
    assert warned(model) == []
