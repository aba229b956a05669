"""Routers match their equations, written in numpy and plain integers."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.shared import Shared
from tests.library.test_moefy import transformer_xl
from tests.tiny import parse
from utils.errors import UserError

D = 8


def router(name: str, experts: int = 6, **settings) -> nn.Module:
    """A router with a nonzero bias."""
    torch.manual_seed(0)
    config = sd.SMoEConfig(experts, 1, router=name, init_std=1.0, **settings)
    made = load(ROUTERS, "router", config.router)(D, config)
    if getattr(made, "bias", None) is not None:
        nn.init.normal_(made.bias)
    if "tokens" in made.needs:
        made.shared = Shared()
        made.shared.tokens = torch.arange(40)
    return made


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear(gate: nn.Module, x: torch.Tensor) -> np.ndarray:
    return numpy(x) @ numpy(gate.weight).T + numpy(gate.bias)


def cv_squared(values: np.ndarray) -> float:
    return np.mean((values - values.mean()) ** 2) / values.mean() ** 2


def switch(logits: np.ndarray, indices: np.ndarray) -> float:
    experts = logits.shape[1]
    return experts * sum((indices == e).mean() * softmax(logits)[:, e].mean() for e in range(experts))


def check(routing: sd.Routing, scores: np.ndarray, k: int, weights: np.ndarray | None = None) -> None:
    """Assert that the k highest scores were chosen and weighed by their softmax, or by `weights` [N, E]."""
    indices = routing.indices_NK.numpy()
    assert indices.shape == routing.weights_NK.shape == (len(scores), k) and routing.indices_NK.dtype == torch.int64
    np.testing.assert_array_equal(np.sort(indices), np.sort(np.argsort(-scores)[:, :k]))
    expected = softmax(np.take_along_axis(scores, indices, 1)) if weights is None else np.take_along_axis(weights, indices, 1)
    np.testing.assert_allclose(numpy(routing.weights_NK), expected, rtol=2e-5, atol=1e-9)


def about(count: float, draws: int, probability: float) -> bool:
    """Return whether a binomial count is within five standard deviations of its mean."""
    return abs(count - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability))


# hash


def murmur(value: int) -> int:
    """MurmurHash3's 64-bit finaliser as a signed integer."""
    value %= 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor % 2**64
    value ^= value >> 33
    return value - 2**64 if value >= 2**63 else value


def hashed(ids: torch.Tensor, gate: nn.Module, k: int) -> np.ndarray:
    """Experts of each token id in ascending order [N, K]."""
    E, seed = gate.num_experts, int(gate.seed)
    rows = [sorted(range(E), key=lambda e: -murmur(token * E + e + seed))[:k] for token in ids.flatten().tolist()]
    return np.sort(np.array(rows))


def hash_of(ids: torch.Tensor, experts: int, k: int, seed: int = 0) -> tuple[sd.Routing, nn.Module]:
    torch.manual_seed(seed)
    gate = load(ROUTERS, "router", "hash")(D, sd.SMoEConfig(experts, 1, router="hash"))
    gate.shared = Shared()
    gate.shared.tokens = ids
    return gate(torch.zeros(ids.numel(), D), k), gate


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (6, 3), (5, 5)])
def test_hash_matches_plain_integers(experts, k):
    ids = torch.tensor([[0, 1, 255, 7], [7, 2**31, 0, 50_000]])
    routing, gate = hash_of(ids, experts, k)
    np.testing.assert_array_equal(np.sort(routing.indices_NK.numpy()), hashed(ids, gate, k))
    assert routing.weights_NK.shape == (8, k) and torch.all(routing.weights_NK == 1 / k) and routing.losses == {}
    assert list(gate.parameters()) == []


@pytest.mark.parametrize("seed", range(3))
def test_hash_distributes_ids_over_experts_and_pairs(seed):
    chosen = np.sort(hash_of(torch.arange(6000), 4, 2, seed)[0].indices_NK.numpy())
    for pair in itertools.combinations(range(4), 2):
        assert about((chosen == pair).all(1).sum(), 6000, 1 / 6)
    same = (chosen[1:] == chosen[:-1]).all(1).sum()  # consecutive ids are independent
    assert about(same, 5999, 1 / 6)


def hash_model() -> nn.Module:
    return sd.moefy(transformer_xl(n_layer=3), sd.SMoEConfig(4, 2, router="hash"))


def test_hash_in_a_transformer_routes_by_token_id_only():
    model = hash_model()
    ids = torch.tensor([[3, 1, 3, 10, 0, 1], [1, 3, 9, 9, 2, 5]])
    _, memory = model.hidden(ids)
    seeds = set()
    for segment, state in ((ids, None), (ids.flip(1), memory), (ids[:1, :2], None)):
        model.hidden(segment, state)
        for _, layer in sd.moe_layers(model):
            np.testing.assert_array_equal(np.sort(layer.assigned.numpy()), hashed(segment, layer.router, 2))
            seeds.add(int(layer.router.seed))
    assert len(seeds) == 3


def test_hash_seed_is_saved_with_the_model():
    model, other = hash_model(), hash_model()
    for _, layer in sd.moe_layers(other):
        layer.router.seed += 12345
    ids = torch.arange(11).view(1, 11)
    assert [name for name in model.state_dict() if name.endswith("router.seed")] != []
    assert not torch.equal(model.hidden(ids)[0], other.hidden(ids)[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.hidden(ids)[0], other.hidden(ids)[0])


def test_copied_hash_model_uses_its_own_tokens():
    model = hash_model()
    ids, others = torch.tensor([[3, 1, 4, 1]]), torch.tensor([[2, 7], [1, 8], [2, 8]])
    model.hidden(others)
    twin = copy.deepcopy(model)
    model.hidden(ids)
    twin.hidden(others)
    for (_, ours), (_, theirs) in zip(sd.moe_layers(model), sd.moe_layers(twin), strict=True):
        assert torch.equal(ours.shared.tokens, ids) and torch.equal(theirs.shared.tokens, others)
        np.testing.assert_array_equal(np.sort(ours.assigned.numpy()), hashed(ids, ours.router, 2))
        np.testing.assert_array_equal(np.sort(theirs.assigned.numpy()), hashed(others, ours.router, 2))


def test_hash_rejects_positions_without_token_ids():
    model = hash_model()
    model.hidden(torch.tensor([[1, 2, 3]]))
    with pytest.raises(RuntimeError, match="has no token ids"):
        model.layers[0].feed_forward(torch.zeros(1, 4, D))
    sd.moe_layers(model)[0][1].shared.see_tokens(None, (torch.tensor([[1, 2, 3]]),), {})
    with pytest.raises(RuntimeError, match="got 3 token ids for 4 positions"):
        model.layers[0].feed_forward(torch.zeros(1, 4, D))


def test_hash_needs_a_token_embedding():
    with pytest.raises(sd.ConfigError, match="no token embedding"):
        sd.moefy(feed_forwards(), sd.SMoEConfig(4, 2, router="hash"))


# uniform


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate_weight", ["softmax", "uniform"])
def test_uniform_draws_for_every_token_and_pass(training, gate_weight):
    gate, x = router("uniform", gate_weight=gate_weight).train(training), tokens(4000)
    torch.manual_seed(7)
    first, second = gate(x, 2), gate(x, 2)
    torch.manual_seed(7)
    for routing in (first, second):
        check(routing, numpy(torch.rand(4000, 6)), 2, None if gate_weight == "softmax" else np.full((4000, 6), 1 / 2))
        assert all(about(count, 4000, 1 / 3) for count in np.bincount(routing.indices_NK.flatten()))
    same = (first.indices_NK.sort().values == second.indices_NK.sort().values).all(1).sum().item()
    assert about(same, 4000, 1 / 15) and first.losses == {}


# logit_drop


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("k", [1, 4, 6])
def test_logit_drop(p, k):
    gate, x = router("logit_drop", options={"logit_dropout": p}), tokens()
    torch.manual_seed(7)
    routing = gate(x, k)
    torch.manual_seed(7)
    kept = F.dropout(torch.ones(40, 6), p).numpy() > 0  # the same draw
    assert kept.all() == (p == 0)
    dropped = np.where(kept, linear(gate, x) / (1 - p), 0.0)
    chosen = np.take_along_axis(dropped, routing.indices_NK.numpy(), 1)  # ties between zeros may be broken either way
    np.testing.assert_allclose(np.sort(chosen)[:, ::-1], -np.sort(-dropped)[:, :k], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy(routing.weights_NK), softmax(chosen), rtol=2e-5)
    assert routing.losses == {}
    check(gate.eval()(x, k), linear(gate, x), k)


def test_logit_drop_defaults_to_a_half_and_supports_a_balance_loss():
    gate, x = router("logit_drop", balance_loss=0.5), tokens()
    torch.manual_seed(7)
    routing = gate(x, 2)
    torch.manual_seed(7)
    dropped = np.where(F.dropout(torch.ones(40, 6), 0.5).numpy() > 0, 2 * linear(gate, x), 0.0)
    assert routing.losses["balance"].item() == pytest.approx(0.5 * switch(dropped, routing.indices_NK.numpy()), rel=1e-5)
    assert gate.eval()(x, 2).losses == {}


# dense_to_sparse


@pytest.mark.parametrize(("step", "temperature"), [(None, 2.0), (0, 2.0), (25, 1.575), (50, 1.15), (100, 0.3), (400, 0.3)], ids=str)
@pytest.mark.parametrize(("k", "threshold"), [(1, 0.001), (2, 0.1), (5, 0.3), (1, 0.0)])
def test_dense_to_sparse(step, temperature, k, threshold):
    gate, x = router("dense_to_sparse", balance_loss=0.25, options={"threshold": threshold}), tokens()
    if step is not None:
        sd.set_progress(gate, step, 100)
    torch.manual_seed(7)
    routing = gate(x, k)
    torch.manual_seed(7)
    gumbel = -np.log(numpy(torch.empty(40, 6).exponential_()))
    p = softmax((linear(gate, x) + gumbel) / temperature)
    active = max(k, math.floor((p > threshold).sum(1).mean()))
    check(routing, p, active, p)
    assert gate.metrics() == {"temperature": pytest.approx(temperature), "active_experts": active} and gate.computed(k) == active
    assert routing.losses["balance"].item() == pytest.approx(0.25 * switch(linear(gate, x), routing.indices_NK.numpy()), rel=1e-5)
    check(gate.eval()(x, k), linear(gate, x), k)
    assert gate.computed(k) == k and gate(x, k).losses == {}


def test_dense_to_sparse_activates_fewer_experts_over_training():
    model = sd.moefy(feed_forwards(), sd.SMoEConfig(8, 1, router="dense_to_sparse", options={"threshold": 0.02}))
    active = []
    for step in (0, 500, 1000):
        sd.set_progress(model, step, 1000)
        model(tokens(500))
        active.append(model[0].assigned.shape[1])
        assert model[0].computed_experts == active[-1]
    assert active[0] > active[1] > active[2] >= 1
    sd.set_top_k(model, 3)
    model.eval()(tokens(500))
    assert model[0].assigned.shape == (500, 3) and model[0].computed_experts == 3


@pytest.mark.parametrize("step", [0, 100])
def test_noise_of_dense_to_sparse_is_gumbel(step):
    """The largest of logit + noise then is expert e with probability softmax(logits)_e, at any temperature."""
    gate = router("dense_to_sparse", experts=4, options={"threshold": 0.999999})
    sd.set_progress(gate, step, 100)
    x = tokens(1) / 4
    torch.manual_seed(7)
    routing = gate(x.expand(20_000, -1), 1)
    expected = softmax(linear(gate, x))[0]
    assert expected.min() > 0.02
    assert all(about(count, 20_000, p) for count, p in zip(np.bincount(routing.indices_NK[:, 0]), expected, strict=True))


# noisy_top_k


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("k", [1, 3, 5, 6])
def test_noisy_top_k(k):
    gate, x = router("noisy_top_k"), tokens()
    torch.manual_seed(7)
    routing = gate(x, k)
    torch.manual_seed(7)
    noise = numpy(torch.randn(40, 6))
    clean, deviation = linear(gate, x), np.log1p(np.exp(numpy(x) @ numpy(gate.noise_weight).T))
    H = clean + noise * deviation
    check(routing, H, k)

    gates, load = np.zeros((40, 6)), np.zeros(6)
    np.put_along_axis(gates, np.argsort(-H)[:, :k], softmax(-np.sort(-H)[:, :k]), 1)
    assert routing.losses.keys() == ({"importance", "load"} if k < 6 else {"importance"})
    assert routing.losses["importance"].item() == pytest.approx(0.1 * cv_squared(gates.sum(0)), rel=1e-4)
    if k < 6:
        for n, i in itertools.product(range(40), range(6)):
            others = sorted((H[n, j] for j in range(6) if j != i), reverse=True)
            load[i] += normal_cdf((clean[n, i] - others[k - 1]) / deviation[n, i])
        assert routing.losses["load"].item() == pytest.approx(0.1 * cv_squared(load), rel=1e-4)
    check(gate.eval()(x, k), clean, k)
    assert gate(x, k).losses == {}


def test_noisy_top_k_trains_its_noise_unless_frozen():
    gate = router("noisy_top_k")
    routing = gate(tokens(), 2)
    routing.losses["load"].backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in gate.parameters()) and len(list(gate.parameters())) == 3
    assert not any(parameter.requires_grad for parameter in router("noisy_top_k", freeze_router=True).parameters())
    assert router("NoisyGate")(tokens(), 2).losses == {}


def test_noisy_top_k_losses_vanish_for_identical_experts():
    gate = router("noisy_top_k", experts=3)
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    torch.manual_seed(7)
    losses = gate(tokens(3000), 1).losses
    assert losses["importance"].item() < 1e-3 and losses["load"].item() < 1e-3


# router none, and rejected settings


def feed_forwards(layers: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D)) for _ in range(layers)))


LOGITS = ("competesmoe", "similarity", "attention")
PAIRS = [("none", None), ("random", "thor"), *((router, method) for router in ("hash", "uniform", "noisy_top_k") for method in LOGITS)]


@pytest.mark.parametrize(("router", "method"), PAIRS)
def test_routers_that_a_method_does_not_support_are_rejected(router, method):
    """No choice of experts, choices that the method ignores, and routers without the logits that the method needs."""
    model = feed_forwards()
    with pytest.raises(sd.ConfigError, match=f"router '{router}'"):
        sd.moefy(model, sd.SMoEConfig(4, 2, router=router, method=method))
    assert not sd.moe_layers(model)
    with pytest.raises(UserError, match=f"router '{router}'"):
        parse(["--preset", "quick", "--moe", "--gate_name", router, *(["--method", method] if method else [])])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dense_to_sparse", {"min_temp": 3.0}, r"min_temp = 3.0 and max_temp = 2.0 must satisfy"),
        ("dense_to_sparse", {"min_temp": 0}, "min_temp = 0.0"),
        ("dense_to_sparse", {"threshold": 1.0}, "threshold = 1.0"),
        ("dense_to_sparse", {"threshold": "much"}, "threshold = 'much' must be a finite number"),
        (
            "dense_to_sparse",
            {"logit_dropout": 0.1},
            "unknown option logit_dropout; .*max_temp=2.0, min_temp=0.3, threshold",
        ),
        ("logit_drop", {"logit_dropout": 1.0}, "logit_dropout = 1.0"),
        ("logit_drop", {"logit_dropout": -0.1}, "logit_dropout = -0.1"),
        ("hash", {"seed": 3}, "unknown option seed; .*none"),
    ],
)
def test_invalid_options_are_rejected(name, options, words):
    model = feed_forwards()
    before = list(model.modules())
    with pytest.raises(sd.ConfigError, match=words):
        sd.moefy(model, sd.SMoEConfig(4, 2, router=name, options=options))
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    ("name", "settings"), [("hash", {"balance_loss": 0.1}), ("hash", {"gate_weight": "uniform"}), ("uniform", {"balance_loss": 1})]
)
def test_settings_without_effect_are_rejected(name, settings):
    model = feed_forwards()
    with pytest.raises(sd.ConfigError, match=f"has no effect with router '{name}'"):
        sd.moefy(model, sd.SMoEConfig(4, 2, router=name, **settings))
    assert not sd.moe_layers(model)
