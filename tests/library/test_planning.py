"""sd.plan: dynamic programming is exact, no plan is worse than uniform k, budgets hold; a plan is saved, loaded and refused."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.planning.search import Costs, between, least_loss, search

D = 8


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D))


def model_with_experts(counts: tuple[int, ...] = (4, 2, 4), **settings) -> nn.Module:
    """A chain of expert layers, as many experts in each as `counts` says."""
    torch.manual_seed(0)
    config = {"num_experts": max(counts), "top_k": 2, "router": "learned", "init_std": 0.5, "d_expert": 4, "expert_init": "fresh"}
    model = nn.Sequential(*[network() for _ in counts])
    sd.moefy(model, sd.SMoEConfig(**config | ({"experts_by_layer": counts} if len({*counts}) > 1 else {}) | settings))
    return model


X = torch.randn(24, D, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, rows: torch.Tensor = X):
    return lambda: (model(rows) - rows.roll(1, 0)).square().mean()


@pytest.mark.parametrize("seed", range(40))
def test_dynamic_programming_finds_what_trying_everything_finds(seed):
    draw = random.Random(seed)
    layers, options = draw.randint(1, 4), draw.randint(1, 4)
    values = [[draw.uniform(-1, 1) for _ in range(options)] for _ in range(layers)]
    costs = [[draw.randint(0, 6) for _ in range(options)] for _ in range(layers)]
    limit = draw.randint(0, 4 * layers)
    everything = [
        sum(values[i][j] for i, j in enumerate(chosen))
        for chosen in itertools.product(range(options), repeat=layers)
        if sum(costs[i][j] for i, j in enumerate(chosen)) <= limit
    ]
    found = least_loss(values, costs, limit)
    assert (found is None) == (not everything)
    if found is not None:
        assert sum(costs[i][j] for i, j in enumerate(found)) <= limit
        assert sum(values[i][j] for i, j in enumerate(found)) == pytest.approx(min(everything))


def table(layers: int, experts: int, loss_of) -> tuple[dict, Costs]:
    every = itertools.product(range(1, experts + 1), repeat=layers)
    return {ks: loss_of(ks) for ks in every}, Costs([[10 * k for k in range(1, experts + 1)]] * layers, 7, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_is_worse_than_uniform_even_if_losses_do_not_add_up(seed):
    """Losses are random numbers, without any relation between neighbouring plans; also with a budget between two uniform k."""
    draw = random.Random(seed)
    loss, costs = table(3, 5, lambda _: draw.random())
    limit = draw.randint(costs.of((1, 1, 1)), costs.of((5, 5, 5)))
    uniform = [(k, k, k) for k in range(1, 6) if costs.of((k, k, k)) <= limit]
    near = between(uniform[-1], costs, limit)
    found = search(loss.__getitem__, [uniform[-1], *uniform, *near], costs, limit)
    assert costs.of(found) <= limit and all(costs.of(ks) <= limit for ks in near)
    assert loss[found] <= min(loss[ks] for ks in [*uniform, *near])


@pytest.mark.parametrize("limit", [37, 60, 90, 113, 157])
def test_losses_that_add_up_are_planned_optimally(limit):
    worth = [[3, 1, 0.5, 0.2, 0], [9, 1, 0.9, 0.8, 0.7], [2, 1.9, 1.8, 0.1, 0]]
    loss, costs = table(3, 5, lambda ks: sum(layer[k - 1] for layer, k in zip(worth, ks, strict=True)))
    uniform = [(k, k, k) for k in range(5, 0, -1) if costs.of((k, k, k)) <= limit]
    found = search(loss.__getitem__, uniform, costs, limit)
    assert loss[found] == min(value for ks, value in loss.items() if costs.of(ks) <= limit)


@pytest.mark.parametrize("flops", [0.3, 0.5, 0.77, 1])
def test_plan_keeps_its_budget_and_says_what_was_measured(flops):
    """FLOPs are counted by hand: k of the E experts of layers that differ in E, all experts equally large."""
    model = model_with_experts()
    passes = [losses(model), losses(model, X[:7])]
    plan = sd.plan(model, passes, flops=flops)
    assert {**plan} == plan.k and list(plan) == [name for name, _ in sd.moe_layers(model)] and len(plan) == 3
    assert plan.predicted == pytest.approx(sum(plan.values()) / 10) and plan.predicted <= flops + 1e-9
    assert plan.measured == pytest.approx(plan.predicted) and plan.loss <= plan.uniform_loss
    model.eval()
    for k, loss in ((plan, plan.loss), (plan.uniform, plan.uniform_loss)):
        with sd.top_k(model, k), torch.no_grad():
            assert sum(float(run()) for run in passes) / 2 == pytest.approx(loss)


def test_plan_finds_the_layer_that_needs_experts():
    """Experts of the first layer are all alike, so that one is as good as four."""
    model = model_with_experts((4, 4), gate_weight="uniform", freeze_router=True)
    first = sd.moe_layers(model)[0][1].experts
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        sd.set_top_k(model, 4)
        target = model.eval()(X)
    plan = sd.plan(model, [lambda: (model(X) - target).square().mean()], flops=5 / 8)
    assert list(plan.values()) == [1, 4] and plan.loss < 1e-9 < plan.uniform_loss and plan.uniform == 2


def test_masks_weigh_passes_by_their_positions():
    model = model_with_experts()
    pairs = [(losses(model, X[:6]), torch.arange(6) < 2), (losses(model, X), torch.ones(24, dtype=torch.bool))]
    plan = sd.plan(model, pairs, flops=1)
    with sd.top_k(model.eval(), plan), torch.no_grad():
        assert plan.loss == pytest.approx(sum(w * float(run()) for w, (run, _) in zip((2, 24), pairs, strict=True)) / 26)


def test_planning_leaves_the_model_and_the_random_state_as_they_were():
    model = model_with_experts().train()
    layers = [layer for _, layer in sd.moe_layers(model)]
    layers[0].eval()
    before, state, calls = copy.deepcopy(model.state_dict()), torch.random.get_rng_state(), itertools.count()

    def fails():
        return losses(model)() if next(calls) < 9 else 1 / 0

    with sd.top_k(model, [4, 1, 3]):
        for budget in ({"flops": 0.5}, {"milliseconds": 1e6}):
            with pytest.raises(ZeroDivisionError):
                sd.plan(model, [fails], **budget)
            calls = itertools.count(-1000)
            sd.plan(model, [fails], **budget, repeats=1)
            assert sd.get_top_k(model) == {"0": 4, "1": 1, "2": 3}
            calls = itertools.count()
    assert sd.get_top_k(model) == 2
    assert model.training and not layers[0].training and layers[1].training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_plan_for_milliseconds():
    """With time for everything the best of all is found; its time is measured."""
    model = model_with_experts((4, 4))
    plan = sd.plan(model, [losses(model)], milliseconds=1e6, repeats=1)
    assert plan.unit == "milliseconds" and 0 < plan.predicted < 1e6 and plan.measured > 0 and plan.uniform == 4
    assert plan.loss <= min(sd.plan(model, [losses(model)], flops=share).loss for share in (0.25, 1))


def test_plan_is_taken_wherever_k_is():
    model = model_with_experts()
    plan = sd.plan(model, [losses(model)], flops=0.6)
    with sd.top_k(model, plan):
        assert dict(zip(plan, (layer.top_k for _, layer in sd.moe_layers(model)), strict=True)) == plan.k
    slimmed = sd.slim(model, plan)
    sd.set_top_k(model, plan)
    assert [layer.default_k for _, layer in sd.moe_layers(model)] == [layer.default_k for _, layer in sd.moe_layers(slimmed)]
    assert torch.equal(slimmed(X), model.eval()(X))


OTHERS = {"experts": {"counts": (4, 3, 4)}, "width": {"d_expert": 5}, "layers": {"counts": (4, 2)}}


@pytest.mark.parametrize("other", OTHERS)
def test_plan_of_another_model_is_refused(other):
    model = model_with_experts()
    plan = sd.plan(model, [losses(model)], flops=0.4)
    another = model_with_experts(**OTHERS[other])
    for take in (sd.set_top_k, sd.slim, lambda model, k: sd.top_k(model, k).__enter__()):
        with pytest.raises(sd.ConfigError, match="the plan belongs to another model"):
            take(another, plan)
    assert sd.get_top_k(another) == 2


def test_plan_round_trip_is_strict(tmp_path):
    model = model_with_experts()
    plan, path = sd.plan(model, [losses(model)], flops=0.5), tmp_path / "plan.json"
    plan.save(path)
    assert sd.Plan.load(path) == plan
    sd.set_top_k(model, sd.Plan.load(path))
    content = json.loads(path.read_text())
    damages = [
        {"plan": 2},
        {"k": {}},
        {"k": {**plan.k, "1": 3}},
        {"k": {**plan.k, "1": 0}},
        {"k": {**plan.k, "1": "1"}},
        {"k": {"0": 1}},
        {"k": [1, 1, 1]},
        {"sizes": {**plan.sizes, "0": [4, 4]}},
        {"sizes": {**plan.sizes, "0": 4}},
        {"unit": "seconds"},
        {"budget": -1},
        {"loss": math.nan},
        {"loss": None},
        {"evaluations": 0.5},
        {"extra": 1},
    ]
    for change in damages:
        path.write_text(json.dumps(content | change))
        with pytest.raises(sd.ConfigError, match=r"plan\.json cannot be read as a plan"):
            sd.Plan.load(path)
    for text in ("", "[]", "{"):
        path.write_text(text)
        with pytest.raises(sd.ConfigError, match=r"plan\.json"):
            sd.Plan.load(path)
    with pytest.raises(sd.ConfigError, match="cannot be read"):
        sd.Plan.load(tmp_path / "nowhere")


def half(model: nn.Module):
    return lambda: model[0](X).mean()


def carrying(model: nn.Module):
    """A pass that continues what the last one left."""
    state = [0.0]

    def run():
        state[0] += float(losses(model)())
        return state[0]

    return run


REFUSED = [
    ("learned", lambda m: [losses(m)], {}, "one budget: flops=0.5"),
    ("learned", lambda m: [losses(m)], {"flops": 0.5, "milliseconds": 3}, "one budget: flops=0.5"),
    ("learned", lambda m: [losses(m)], {"flops": 0.2}, "less than k = 1 in every layer costs: give at least 0.3"),
    ("learned", lambda m: [losses(m)], {"flops": 50}, "flops = 50 is a fraction"),
    ("learned", lambda m: [losses(m)], {"flops": math.nan}, "flops = nan must be"),
    ("learned", lambda m: [losses(m)], {"flops": "0.5"}, "flops = '0.5' must be"),
    ("learned", lambda m: [losses(m)], {"milliseconds": 1e-9}, "less than k = 1 in every layer costs"),
    ("learned", lambda m: [losses(m)], {"flops": 0.5, "repeats": 0}, "repeats = 0 must be"),
    ("learned", lambda m: [], {"flops": 0.5}, "passes is empty"),
    ("learned", lambda m: X, {"flops": 0.5}, "passes is a Tensor"),
    ("learned", lambda m: [3], {"flops": 0.5}, "each of the passes must be a pair"),
    ("learned", lambda m: [(losses(m), torch.zeros(24, dtype=torch.bool))], {"flops": 0.5}, "they are all padding"),
    ("learned", lambda m: [losses(m), (losses(m), X[:, 0] > 0)], {"flops": 0.5}, "some of the passes have a mask"),
    ("learned", lambda m: [lambda: m(X)], {"flops": 0.5}, "returned a Tensor: it must return its mean loss"),
    ("learned", lambda m: [lambda: None], {"flops": 0.5}, "returned a NoneType: it must return its mean loss"),
    ("learned", lambda m: [lambda: losses(m)() * math.nan], {"flops": 0.5}, "the loss of a pass is nan at k = 1"),
    ("learned", lambda m: [half(m)], {"flops": 0.5}, "no pass reached 1, 2"),
    ("learned", lambda m: [carrying(m)], {"flops": 0.5}, "each must start from the same state"),
    ("uniform", lambda m: [losses(m)], {"flops": 0.5}, "'0' .router 'uniform'. differs with other random numbers"),
    ("none", lambda m: [losses(m)], {"flops": 0.5}, "'0' .router 'none'. differs with other random numbers"),
]


@pytest.mark.parametrize("router, passes, budget, sentence", REFUSED)
def test_refusals(router, passes, budget, sentence):
    model = model_with_experts(router=router, method="thor" if router == "none" else None)
    with pytest.raises(sd.ConfigError, match=sentence):
        sd.plan(model, passes(model), **budget)
    with pytest.raises(sd.ConfigError, match="has no MoE layers"):
        sd.plan(network(), [lambda: 0.0], flops=0.5)
