"""Control of k, routers, the MoE layer, and schedules of k."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.routers import LearnedRouter, RandomRouter, switch_balance_loss
from smoe_dropout.schedule import SCHEDULES


class Net(nn.Module):
    """Residual feed-forward layers."""

    def __init__(self, n_layer=2, d_model=8, d_ff=16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)) for _ in range(n_layer))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def sparse(n_layer=2, **settings) -> Net:
    torch.manual_seed(0)
    return sd.moefy(Net(n_layer), sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, "init_std": 0.5, **settings}))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1))


# k


def test_set_get_and_temporary_k():
    model = sparse()
    assert sd.get_top_k(model) == 2
    sd.set_top_k(model, 4)
    assert [layer.top_k for _, layer in sd.moe_layers(model)] == [4, 4]
    model(tokens(5))
    assert all(layer.assigned.shape == (5, 4) for _, layer in sd.moe_layers(model))
    with sd.top_k(model, 1) as same:
        assert same is model and sd.get_top_k(model) == 1
        with sd.top_k(model, 3):
            assert sd.get_top_k(model) == 3
        assert sd.get_top_k(model) == 1
    assert sd.get_top_k(model) == 4


def test_temporary_k_is_restored_per_layer_and_after_an_exception():
    model = sparse()
    layers = [layer for _, layer in sd.moe_layers(model)]
    layers[0].top_k, layers[1].top_k = 1, 3
    assert list(sd.get_top_k(model).values()) == [1, 3]
    with pytest.raises(ZeroDivisionError), sd.top_k(model, 4):
        _ = 1 / 0
    assert [layer.top_k for layer in layers] == [1, 3]
    with pytest.raises(ValueError, match="k = 5"), sd.top_k(model, 5):
        pass
    assert [layer.top_k for layer in layers] == [1, 3]


@pytest.mark.parametrize("k", [0, -1, 5, 1.5])
def test_invalid_k_changes_no_layer(k):
    model = nn.ModuleList([sparse(1, num_experts=4, top_k=1), sparse(1, num_experts=2, top_k=1)])
    with pytest.raises(ValueError, match=f"k = {k}"):
        sd.set_top_k(model, k)
    assert sd.get_top_k(model) == 1


@pytest.mark.parametrize(
    "knob", [sd.get_top_k, sd.freeze_routers, partial(sd.set_top_k, k=1), lambda model: sd.top_k(model, 1).__enter__()]
)
def test_dense_models_are_rejected(knob):
    with pytest.raises(ValueError, match="Net has no MoE layers"):
        knob(Net())
    assert sd.auxiliary_loss(Net()) == 0 and sd.expert_load(Net()) == {} and sd.moe_layers(Net()) == []


# routers


def trained(model) -> set[bool]:
    return {parameter.requires_grad for _, layer in sd.moe_layers(model) for parameter in layer.router.parameters()}


@pytest.mark.parametrize(
    ("router", "freeze", "expected"),
    [("random", None, False), ("learned", None, True), ("random", False, True), ("learned", True, False), ("NaiveGate", None, True)],
)
def test_frozen_and_trained_routers(router, freeze, expected):
    model = sparse(router=router, freeze_router=freeze)
    assert trained(model) == {expected}
    sd.freeze_routers(model)
    assert trained(model) == {False}
    sd.freeze_routers(model, False)
    assert trained(model) == {True}
    assert all(parameter.requires_grad for _, layer in sd.moe_layers(model) for parameter in layer.experts.parameters())


@pytest.mark.parametrize("gate_weight", ["softmax", "uniform"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_router_matches_a_plain_implementation(gate_weight, k):
    torch.manual_seed(0)
    router = RandomRouter(8, sd.SMoEConfig(6, 1, gate_weight=gate_weight, init_std=1.0))
    assert not router.bias.any() and router.weight.std() > 0.5
    router.bias.copy_(torch.randn(6))
    x = tokens(20)
    routing = router(x, k)
    for row, indices, weights in zip(x.numpy(), routing.indices_NK.numpy(), routing.weights_NK.numpy(), strict=True):
        logits = router.weight.numpy() @ row + router.bias.numpy()
        chosen = sorted(range(6), key=lambda expert: -logits[expert])[:k]
        assert sorted(indices) == sorted(chosen)
        expected = np.exp(logits[indices]) / np.exp(logits[chosen]).sum() if gate_weight == "softmax" else np.full(k, 1 / k)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert routing.losses == {}


def test_logits_are_float32_in_any_model_precision():
    router = LearnedRouter(8, sd.SMoEConfig(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert router.logits(tokens(3)).dtype == torch.float32
    assert router.logits(tokens(3).bfloat16()).dtype == torch.float32
    assert router.bfloat16().logits(tokens(3).bfloat16()).dtype == torch.float32


# balance loss and load


def plain_switch_loss(logits: np.ndarray, indices: np.ndarray) -> float:
    total, (n, experts) = 0.0, logits.shape
    for expert in range(experts):
        share = sum(expert in row for row in indices) / indices.size
        probability = sum(math.exp(row[expert]) / sum(map(math.exp, row)) for row in logits) / n
        total += share * probability
    return experts * total


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 3), (6, 6)])
def test_balance_loss_matches_a_plain_implementation(experts, k):
    logits = torch.randn(30, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    indices = logits.topk(k).indices
    assert switch_balance_loss(logits, indices).item() == pytest.approx(plain_switch_loss(logits.numpy(), indices.numpy()), rel=1e-12)
    balanced = torch.tensor([[(n + slot) % experts for slot in range(k)] for n in range(experts)])
    assert switch_balance_loss(torch.ones(experts, experts), balanced).item() == pytest.approx(1)
    assert switch_balance_loss(logits * 0, indices).item() == pytest.approx(1)  # uniform probabilities, for any assignment


@pytest.mark.parametrize(("router", "coefficient", "used"), [("learned", None, 0.01), ("learned", 0.5, 0.5), ("random", 0.25, 0.25)])
def test_auxiliary_loss_is_the_sum_over_layers_in_training_only(router, coefficient, used):
    model, x = sparse(router=router, balance_loss=coefficient), tokens(7)
    assert sd.auxiliary_loss(model) == 0
    model(x)
    expected, hidden = 0.0, x
    for layer in model.layers:
        expected += used * switch_balance_loss(layer.router.logits(hidden), layer.assigned).item()
        hidden = hidden + layer(hidden)
    model(x)
    loss = sd.auxiliary_loss(model)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all((layer.router.weight.grad is not None) == (router == "learned") for layer in model.layers)
    model.eval()(x)
    assert sd.auxiliary_loss(model) == 0


@pytest.mark.parametrize("settings", [{}, {"router": "NaiveGate"}, {"router": "learned", "balance_loss": 0.0}], ids=str)
def test_no_auxiliary_loss(settings):
    model = sparse(**settings)
    model(tokens(3))
    assert sd.auxiliary_loss(model) == 0


def test_empty_input_gives_no_nan():
    model = sparse(router="learned")
    assert model(tokens(0)).shape == (0, 8)
    assert sd.auxiliary_loss(model).isfinite() and not any(load.any() for load in sd.expert_load(model).values())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_expert_load_is_the_fraction_of_assignments(k):
    model = sparse(top_k=k)
    assert sd.expert_load(model) == {}
    with pytest.raises(RuntimeError, match="has not run"):
        model.layers[0].load()
    model(tokens(3, 5))
    loads = sd.expert_load(model)
    assert list(loads) == ["layers.0", "layers.1"]
    for name, load in loads.items():
        assert load.sum().item() == pytest.approx(1)
        counts = [int((model.get_submodule(name).assigned == expert).sum()) for expert in range(4)]
        np.testing.assert_allclose(load.numpy(), np.array(counts) / (15 * k), rtol=1e-6)


# the layer


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 2)])
def test_layer_keeps_the_shape_and_treats_tokens_independently(shape):
    layer, x = sparse(1).layers[0], tokens(*shape)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.view(-1, 8)[-1], layer(x.view(-1, 8)[-1]))


@pytest.mark.parametrize("k", [1, 3, 4])
def test_output_scale_dense_is_E_times_the_mean(k):
    mean, dense = (sparse(1, top_k=k, output_scale=scale).layers[0] for scale in ("mean", "dense"))
    torch.testing.assert_close(dense(tokens(6)), 4 * mean(tokens(6)))


def test_model_can_be_copied_after_a_training_pass():
    model, x = sparse(router="learned"), tokens(5)
    y = model(x)
    twin = copy.deepcopy(model)
    assert sd.auxiliary_loss(twin) == 0 and sd.expert_load(twin) == {}
    assert sd.auxiliary_loss(model) > 0 and len(sd.expert_load(model)) == 2
    sd.set_top_k(model, 1)
    assert sd.get_top_k(twin) == 2 and torch.equal(twin(x), y)
    with torch.no_grad():
        twin.layers[0].experts.up.zero_()
    assert model.layers[0].experts.up.any()


# schedules


@pytest.mark.parametrize("mode", SCHEDULES)
def test_schedule_properties(mode):
    random = np.random.default_rng(0)
    for total in [1, 2, 3, 299, 300, 301, 599, *random.integers(1, 2000, 10).tolist()]:
        low, high = sorted(random.integers(1, 65, 2).tolist())
        schedule = sd.TopKSchedule(mode, low, high, total)
        values = [schedule(step) for step in range(total + 1)]
        case = f"{schedule}: {values}"
        assert all(type(k) is int and low <= k <= high for k in values), case
        if mode == "elastic":  # random; tested separately
            continue
        steps = {later - earlier for earlier, later in itertools.pairwise(values)} | {0}
        assert (max(steps) <= 0) if mode.endswith("decrease") else (min(steps) >= 0), case
        assert schedule(total + 1) == schedule(10 * total + 1000) == values[-1], case
        if mode.split("_")[0] in ("linear", "cosine"):
            assert (values[0], values[-1]) == ((high, low) if mode.endswith("decrease") else (low, high)), case


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("linear_increas", 1, 2, 3), "nearest: linear_increase"),
        (("constant", 0, 2, 3), "k_min = 0"),
        (("constant", 3, 2, 3), "k_min = 3 and k_max = 2"),
        (("constant", 1, 2, 0), "total_steps = 0"),
    ],
)
def test_invalid_schedules_are_rejected(arguments, words):
    with pytest.raises(ValueError, match=words):
        sd.TopKSchedule(*arguments)
