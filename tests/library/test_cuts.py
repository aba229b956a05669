"""Cuts, assignments to clusters of equal size, and routers fitted to a cut."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import smoe_dropout as sd
from smoe_dropout.cuts import Neurons, Sample, arranged
from smoe_dropout.cuts.balance import balanced
from smoe_dropout.registry import CUTS
from smoe_dropout.regression import Ridge, log_strength
from smoe_dropout.routers import mlp

F, D, E = 24, 8, 4


@pytest.mark.parametrize(
    ("points", "clusters", "kind"), [(24, 4, "normal"), (96, 16, "skewed"), (60, 5, "ties"), (6, 1, "normal"), (4, 4, "equal")]
)
def test_the_assignment_is_balanced_and_as_cheap_as_scipys(points, clusters, kind):
    draw = torch.Generator().manual_seed(1)
    costs = torch.randn(points, clusters, generator=draw)
    costs = {"normal": costs, "skewed": costs + 3 * torch.arange(clusters), "ties": costs.round(), "equal": torch.ones_like(costs)}[kind]
    found = balanced(costs)
    assert torch.bincount(found, minlength=clusters).tolist() == [points // clusters] * clusters
    rows, places = linear_sum_assignment(np.repeat(costs.double().numpy(), points // clusters, axis=1))
    best = costs.double().numpy()[rows, places // (points // clusters)].sum()
    assert costs.double().gather(1, found[:, None]).sum().item() == pytest.approx(best)


def planted(groups: int = E) -> tuple[Neurons, torch.Tensor]:
    """Neurons of hidden groups, whose rows are alike and which are strong for the same tokens, shuffled; and the group of each [F]."""
    draw = torch.Generator().manual_seed(0)
    group_F = torch.randperm(F, generator=draw) % groups
    directions_GD = torch.linalg.qr(torch.randn(D, D, generator=draw)).Q[:groups]
    token_T = torch.arange(200) % groups
    inputs_TD = directions_GD[token_T] + 0.05 * torch.randn(200, D, generator=draw)
    strength_TF = (token_T[:, None] == group_F).float() + 0.1 * torch.rand(200, F, generator=draw)
    rows_FD = directions_GD[group_F] + 0.05 * torch.randn(F, D, generator=draw)
    return Neurons(rows_FD, torch.rand(F, generator=draw), Sample(inputs_TD, strength_TF)), group_F


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_is_a_permutation_that_follows_from_its_seed(cut, shared):
    neurons, _ = planted()
    orders = [arranged(cut, neurons, E, shared, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(*orders[:2]) and all(sorted(order.tolist()) == [*range(F)] for order in orders)
    assert cut == "contiguous" or not torch.equal(orders[0], torch.arange(F))
    if shared:
        assert set(orders[0][: F // E].tolist()) == set(neurons.importance_F.topk(F // E).indices.tolist())


@pytest.mark.parametrize("cut", ["weights", "coactivation"])
def test_clusters_are_the_groups_that_were_planted(cut):
    neurons, group_F = planted()
    order_F = arranged(cut, neurons, E, 0, torch.Generator().manual_seed(0))
    assert all(len(set(expert.tolist())) == 1 for expert in group_F[order_F].split(F // E))


def dense(gated: bool = False) -> nn.Module:
    """A model with one FFN of 24 hidden units."""
    torch.manual_seed(0)
    return Gated() if gated else nn.Sequential(nn.Embedding(11, D), nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D)))


class Gated(nn.Module):
    """A model with one gated FFN."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mlp = nn.Embedding(11, D), GatedFFN()

    def forward(self, ids):
        return self.mlp(self.embedding(ids))


class GatedFFN(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.down_proj, self.act_fn = nn.Linear(F, D, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


IDS = torch.arange(11).expand(2, 11)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cut", ["contiguous", "random", "weights"])
def test_a_cut_model_computes_the_same_and_becomes_dense_again(cut, gated):
    model = dense(gated)
    before = model(IDS)
    sd.moefy(model, sd.SMoEConfig(E, E, expert_init="split", gate_weight="unit", cut=cut, shared_experts=1))
    torch.testing.assert_close(model(IDS), before)
    with sd.top_k(model, 2):
        assert not torch.allclose(model(IDS), before)
    torch.testing.assert_close(sd.unmoefy(model)(IDS), before)


def test_moefy_draws_nothing_more_for_a_contiguous_cut():
    models = [dense(), dense()]
    for model, given in zip(models, ({}, {"cut": "contiguous"}), strict=True):
        torch.manual_seed(1)
        sd.moefy(model, sd.SMoEConfig(E, 2, expert_init="split", **given))
    assert all(torch.equal(one, other) for one, other in zip(*(model.state_dict().values() for model in models), strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cut": "coactivation"}, "cut = 'coactivation' needs calibration data: use convert.model, passes"),
        ({"cut": "weights", "expert_init": "fresh"}, "no effect with expert_init = 'fresh'"),
        ({"cut": "waits"}, "unknown cut 'waits'; nearest: weights"),
        ({"shared_experts": E}, "shared_experts = 4 must be .* below num_experts = 4"),
        ({"shared_experts": True}, "shared_experts = True must be a whole number"),
        ({"shared_experts": 1, "router": "hash", "gate_weight": "softmax"}, "shared_experts = 1 has no effect with router 'hash'"),
        ({"shared_experts": 1, "method": "momentumsmoe"}, "cannot be combined with method = 'momentumsmoe'"),
        ({"output_scale": "dense"}, "gate_weight = 'unit' sums the experts, which output_scale = 'dense'"),
        ({"expert_init": "copy"}, "gate_weight = 'unit' sums the experts, which expert_init = 'copy'"),
        ({"router": "representative", "options": {"activation": "sine"}}, "unknown option activation 'sine'"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    model = dense()
    with pytest.raises(sd.ConfigError, match=said):
        sd.moefy(model, sd.SMoEConfig(E, 2, **{"expert_init": "split", "gate_weight": "unit", **settings}))
    assert not sd.moe_layers(model)


def test_unit_weights_are_the_factor_of_each_tokens_k():
    model = sd.moefy(dense(), sd.SMoEConfig(E, 2, gate_weight="unit"))
    ((_, layer),) = sd.moe_layers(model)
    layer.router.factor.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    x_ND = torch.randn(3, D)
    assert layer.router(x_ND, 2).weights_NK.tolist() == [[3.0, 3.0]] * 3
    with sd.top_k(model, torch.tensor([1, 3])):
        routing = layer.router(x_ND[:2], layer.selection(x_ND[:2, None]))
    assert routing.weights_NK.tolist() == [[4.0, 0.0, 0.0], [2.0, 2.0, 2.0]]


@pytest.mark.parametrize("router", ["learned", "representative", "mlp"])
def test_shared_experts_come_first_at_every_k(router):
    model = dense()
    sd.moefy(
        model, sd.SMoEConfig(E, E, router=router, shared_experts=2, options={"activation": "relu"} if router == "representative" else {})
    )
    ((_, layer),) = sd.moe_layers(model)
    x_ND = torch.randn(50, D)
    for k in range(1, E + 1):
        indices_NK = layer.router(x_ND, k).indices_NK
        assert set(indices_NK[:, :2].unique().tolist()) == {*range(min(k, 2))}
        assert k < 3 or set(indices_NK[:, 2:].unique().tolist()) == {2, 3}


def test_ridge_regression_finds_a_linear_map():
    draw = torch.Generator().manual_seed(0)
    x_TD, weight_ED, bias_E = (torch.randn(*shape, generator=draw) for shape in ((4000, D), (E, D), (E,)))
    ridge, targets_TE = Ridge(x_TD + 3), x_TD @ weight_ED.t() + bias_E
    weight, bias = ridge.fit(targets_TE)
    torch.testing.assert_close(weight, weight_ED, rtol=0.02, atol=0.02)
    torch.testing.assert_close((x_TD + 3) @ weight.t() + bias, ridge.predicted(targets_TE))


@pytest.mark.parametrize("router", ["learned", "mlp"])
def test_fitted_routers_choose_the_strongest_expert(router, monkeypatch):
    monkeypatch.setattr(mlp, "STEPS", 150)
    neurons, group_F = planted()
    model = sd.moefy(dense(), sd.SMoEConfig(E, 1, router=router))
    ((_, layer),) = sd.moe_layers(model)
    strength_TE = torch.zeros(200, E).index_add_(1, group_F, neurons.sample.strength_TF)
    torch.manual_seed(0)
    layer.router.fit(neurons.sample.inputs_TD, strength_TE, layer.experts)
    chosen_T = layer.router(neurons.sample.inputs_TD, 1).indices_NK[:, 0]
    assert (chosen_T == strength_TE.argmax(1)).float().mean() > 0.99
    logits_TE = layer.router.logits(neurons.sample.inputs_TD)
    assert (logits_TE - log_strength(strength_TE)).square().mean() < log_strength(strength_TE).var() / 4
