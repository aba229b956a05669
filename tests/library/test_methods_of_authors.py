"""Methods with the settings of their authors' code match it, written in numpy from its description; older models keep what they had."""

import dataclasses
import json
import math
import random
import warnings

import numpy as np
import pytest
import torch

import smoe_dropout as sd
from smoe_dropout import competition
from smoe_dropout.methods import thor
from smoe_dropout.methods.base import Settings
from smoe_dropout.options import build_options
from smoe_dropout.registry import METHODS, load
from smoe_dropout.routers.noisy_top_k import NoisyTopKRouter
from tests.library.test_library import Net, tokens
from tests.library.test_methods_sparse import (
    THOR,
    E,
    Recorded,
    affinity_of,
    best,
    close,
    compete,
    competed_steps,
    cross_entropy,
    kl,
    logits,
    mixture,
    responses,
    softmax,
    sparse,
)
from tests.library.test_moefy import transformer_xl
from tests.library.test_routers import about, numpy


def winners_target(s: np.ndarray, k: int) -> np.ndarray:
    """Softmax of the k largest of s, 0 elsewhere: what is left after all others are set to -1e10."""
    kept = np.full_like(s, -1e10)
    for row, indices in enumerate(best(s, k)[1]):
        kept[row, indices] = s[row, indices]
    return softmax(kept)


@pytest.mark.parametrize("k", [1, 2, E])
def test_competesmoe_learns_from_the_winners_as_its_code(k):
    """Every step competes, and the loss is load_balance * alpha * MSE(softmax(gate), softmax(winners))."""
    layer, x = compete().layers[0], tokens(20)
    layer.top_k = k
    output, each = layer(x), responses(layer, numpy(x))
    kept, indices = best(s := affinity_of(each, "norm"), k)
    close(output, mixture(each, indices, softmax(kept)))
    expected = ((softmax(logits(layer, numpy(x))) - winners_target(s, k)) ** 2).mean()
    assert layer.losses.keys() == {"router"}  # no balance loss in a competition step
    assert layer.losses["router"].item() == pytest.approx(0.01 * 5 * expected, rel=1e-4)


def test_competesmoes_target_worked_out_by_hand():
    """Two of four experts win with responses ln 3 and 0: the target is 3/4, 1/4, 0, 0; the router's softmax is 1/4 everywhere."""
    layer = compete(router_loss=1.0, times_balance=False).layers[0]
    affinity = torch.tensor([[math.log(3), 0.0, -1.0, -2.0]])
    winners, indices = torch.tensor([[0.75, 0.25]]), torch.tensor([[0, 1]])
    losses = layer.competition_losses(torch.full((1, 4), 0.25), affinity, winners, indices, None, None)
    assert losses["router"].item() == pytest.approx((0.5**2 + 0 + 0.25**2 + 0.25**2) / 4)


def test_competesmoes_target_trains_the_experts():
    layer, x = compete().layers[0], tokens(6)
    layer.double()
    x = x.double()

    def loss() -> torch.Tensor:
        layer(x)
        return layer.losses["router"]

    gradient = torch.autograd.grad(loss(), layer.experts.down)[0]
    place = tuple(int(index) for index in np.unravel_index(int(gradient.abs().argmax()), gradient.shape))
    ends = []
    for shift in (1e-5, -2e-5):
        layer.experts.down.data[place] += shift
        ends.append(loss().item())
    assert gradient.abs().max() > 1e-4 and gradient[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_competesmoe_without_a_balance_coefficient_is_refused():
    with pytest.raises(sd.ConfigError, match="balance_loss = 0 multiplies the router's loss as well: give option times_balance = False"):
        sparse(Net(1), method="competesmoe", balance_loss=0.0)
    model = sparse(Net(1), method="competesmoe", balance_loss=0.0, options={"times_balance": False})
    model(tokens(3))
    assert sd.auxiliary_loss(model) > 0
    sparse(Net(1), method="competesmoe", balance_loss=0.0, freeze_router=True)  # as after merging


def test_competesmoes_falling_rate():
    """2 / (2 + sqrt(e + 1)) in epoch e, here of 100 steps."""
    model = compete(2, decreasing=True, epochs=3)
    with pytest.warns(UserWarning, match="no layer competes before .*set_progress"):
        model(tokens(1))
    found = competed_steps(model, 300).reshape(3, 100, 2)
    assert [competition.flip_rate(epoch) for epoch in (0, 3, 8)] == pytest.approx([2 / 3, 1 / 2, 2 / 5])
    for epoch, steps in enumerate(found):
        assert about(steps.sum(), 200, 2 / (2 + math.sqrt(epoch + 1)))


def compete2(n_layer: int = 1, **options) -> Net:
    return sparse(Net(n_layer), method="competesmoe2", options={"warm_up": 0.0, "flip_rate": 1.0, **options})


@pytest.mark.parametrize("k", [1, 2, E])
def test_competesmoe2_has_the_losses_of_its_code(k):
    model, x = compete2(), tokens(20)
    layer = model.layers[0]
    layer.top_k = k
    sd.set_progress(model, 0, 10)
    output, each = layer(x), responses(layer, numpy(x))
    kept, indices = best(s := affinity_of(each, "softplus"), k)
    close(output, mixture(each, indices, kept / kept.sum(1, keepdims=True)))
    gate, target = softmax(logits(layer, numpy(x))), softmax(s)
    of_winners = [np.take_along_axis(each_NE, indices, 1) for each_NE in (gate, target)]
    expected = ((gate - target) ** 2).mean() + 0.1 * ((of_winners[0] - of_winners[1]) ** 2).mean()
    assert layer.losses.keys() == {"router", "diversity"}
    assert layer.losses["router"].item() == pytest.approx(0.01 * expected, rel=1e-4)
    chosen = np.take_along_axis(each, indices[..., None], 1)
    similar = 0.0
    for token in chosen:
        for i in range(k):
            for j in range(k):
                similar += 0.0 if i == j else token[i] @ token[j] / np.linalg.norm(token[i]) / np.linalg.norm(token[j])
    assert layer.losses["diversity"].item() == pytest.approx(0.005 * similar / (20 * k * k), rel=1e-4, abs=1e-8)
    weights = [layer.router.weight, layer.experts.down]
    assert [g is None for g in torch.autograd.grad(layer.losses["router"], weights, allow_unused=True, retain_graph=True)] == [False, True]


def test_padding_and_different_k_count_in_no_loss_of_the_competition():
    """The losses of real tokens, each with its own k, are those of these tokens alone, weighted by what they have."""
    model, x = compete2(diversity_loss=1.0, winners_loss=0.5), tokens(1, 6)
    sd.set_progress(model, 0, 10)
    real, k = torch.tensor([[True, True, False, True, True, False]]), torch.tensor([[1, 3, 2, 2, 4, 1]])
    with sd.token_mask(model, real), sd.top_k(model, k):
        model(x)
    layer = model.layers[0]
    kept = [place for place in range(6) if real[0, place]]
    each = responses(layer, numpy(x)[0, kept])
    s, gate = softmax(affinity_of(each, "softplus")), softmax(logits(layer, numpy(x)[0, kept]))
    errors, similar, pairs = [], 0.0, 0
    for n, number in enumerate(k[0, kept].tolist()):
        indices = np.argsort(-s[n])[:number]
        errors += list((gate[n, indices] - s[n, indices]) ** 2)
        directions = each[n, indices] / np.linalg.norm(each[n, indices], axis=1, keepdims=True)
        similar, pairs = similar + (directions @ directions.T).sum() - number, pairs + number**2
    assert layer.losses["router"].item() == pytest.approx(0.01 * (((gate - s) ** 2).mean() + 0.5 * np.mean(errors)), rel=1e-4)
    assert layer.losses["diversity"].item() == pytest.approx(similar / pairs, rel=1e-4)


def moved_plan(drawn: list[list[bool]], most: int) -> list[set[int]]:
    """The plan by the authors' search: the nearest earlier step with room, or else a later one."""
    steps, counts, plan = len(drawn[0]), [0] * len(drawn[0]), []
    for layer in drawn:
        own: set[int] = set()
        waiting = 0
        for step in range(steps):
            full = counts[step] >= most
            if layer[step] and not full:
                own.add(step)
            elif layer[step]:
                earlier = [j for j in range(step) if counts[j] < most and j not in own]
                own |= {earlier[-1]} if earlier else set()
                waiting += not earlier
            elif waiting and not full:
                own.add(step)
                waiting -= 1
        counts = [count + (step in own) for step, count in enumerate(counts)]
        plan.append(own)
    return plan


@pytest.mark.parametrize(("rate", "most"), [(0.07, 2), (0.5, 2), (0.6, 1)])
def test_competesmoe2_moves_competitions_beyond_the_most(rate, most):
    layers, steps = 4, 60
    plan = competition.competition_plan(3, steps, layers, rate, most)
    source = random.Random(3 * 2**40)
    drawn = [[source.random() < rate for _ in range(steps)] for _ in range(layers)]
    assert [set(np.flatnonzero(list(own))) for own in plan] == moved_plan(drawn, most)
    assert max(map(sum, zip(*plan, strict=True))) <= most
    lost = sum(map(sum, drawn)) - sum(map(sum, plan))
    assert lost == 0 or most * steps - sum(map(sum, plan)) < steps  # only where no room is left


def test_competesmoe2_competes_by_its_plan():
    model = compete2(3, flip_rate=0.3, warm_up=0.25, max_layers=1)
    with pytest.warns(UserWarning, match="no layer competes before .*set_progress"):
        model(tokens(1))
    found = competed_steps(model, 40)
    plan = competition.competition_plan(int(model.layers[0].seed), 30, 3, 0.3, 1)
    assert not found[:10].any() and found[10:].T.tolist() == [[bool(one) for one in own] for own in plan]
    sd.set_progress(model, 40, 40)
    model(tokens(1))
    assert not any(layer.competed for layer in model.layers)  # beyond the plan


@pytest.mark.parametrize(("consistency", "ce", "divisor"), [("thor", 1.0, 2), ("smoe_dropout", 0.5, None)])
def test_thor_weighs_its_consistency_as_either_code(consistency, ce, divisor):
    """Microsoft: 1/2 of the sum over symbols beside the sum of cross-entropies. SMoE-Dropout: a mean over symbols beside their mean."""
    model = sparse(transformer_xl(dropout=0.0), **THOR).train()
    torch.manual_seed(4)
    forward = Recorded(model)
    objective = thor.objective(model, forward, Settings(1, 1, thor.Options(alpha=3.0, consistency=consistency), 1000))
    p, q = (numpy(one.logits) for one in forward.passes)
    entropies = cross_entropy(p, forward.targets) + cross_entropy(q, forward.targets)
    expected = ce * entropies + 3 * (kl(p, q) + kl(q, p)).mean() / (divisor or p.shape[-1])
    assert objective.total.item() == pytest.approx(expected, rel=1e-5) and objective.nll.item() == pytest.approx(entropies / 2, rel=1e-5)


def test_noisy_gate_is_fastmoes():
    """Noise never smaller than its epsilon; weights uniform within 1 / sqrt(E), where Kaiming's initialisation sees maps [D, E]."""
    torch.manual_seed(0)
    config = sd.SMoEConfig(num_experts=E, top_k=2, router="NoisyGate")
    gate, plain = (NoisyTopKRouter(2000, one) for one in (config, dataclasses.replace(config, options={"gate_init": "normal"})))
    for weight in (gate.weight, gate.noise_weight):
        assert 0.499 < weight.abs().max() <= 0.5 and weight.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert plain.weight.std().item() == pytest.approx(0.02, rel=0.05) and config.balance_loss == 0.0
    gate.noise_weight.data.fill_(-100.0)  # softplus of it is 0
    x = torch.ones(50, 2000)
    torch.manual_seed(1)
    routing = gate(x, 2)
    torch.manual_seed(1)
    noisy = numpy(gate.logits(x)) + 0.01 * numpy(torch.randn(50, E))
    kept, indices = best(noisy, 2)
    np.testing.assert_array_equal(routing.indices_NK.numpy(), indices)
    close(routing.weights_NK, softmax(kept))


OPTIONS = {name: dataclasses.fields(load(METHODS, "method", name).options) for name in METHODS}
CHANGED = {name: {f.name: f.metadata["earlier"] for f in its if "earlier" in f.metadata} for name, its in OPTIONS.items()}
CHANGED = {name: its for name, its in CHANGED.items() if its}


def test_methods_with_other_defaults_than_before():
    ours = {"flip_rate": 0.03, "router_loss": 1.0, "target": "all", "detach": True, "times_balance": False}
    assert {"competesmoe": ours, "momentumsmoe": {"own_norm": False}}.items() <= CHANGED.items()


@pytest.mark.parametrize("method", CHANGED)
def test_saved_models_of_earlier_versions_keep_their_options(method, tmp_path):
    """Their files have no such options, those of this version have all of them."""
    model, x = sparse(Net(2), method=method, options=CHANGED[method]), tokens(4)
    sd.save_model(model, tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "smoe_config.json").read_text())
    assert stored["options"] == CHANGED[method]
    today = sparse(Net(2), method=method)
    assert dict(sd.moe_layers(today)[0][1].config.options) == {
        name: getattr(build_options(load(METHODS, "method", method).options, {}), name) for name in CHANGED[method]
    }
    old = {**stored, "options": {}}
    config = sd.SMoEConfig.stored(old)
    assert dict(config.options) == CHANGED[method] and sd.SMoEConfig.from_dict(old).options == {}
    (tmp_path / "new" / "smoe_config.json").write_text(json.dumps(old))
    (tmp_path / "new" / "manifest.json").unlink()
    twin = sd.load_weights(sd.moefy(Net(2), config), tmp_path / "new")
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_saved_transformers_models_of_earlier_versions_keep_their_options(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = sd.SMoEConfig(num_experts=4, top_k=2, router="learned", method="momentumsmoe", options={"own_norm": False})
    model, ids = sd.moefy(BertModel(BertConfig(**sizes)), config).eval(), torch.randint(32, (2, 5))
    sd.save_pretrained(model, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["smoe_dropout"]["options"] == {"own_norm": False}
    stored["smoe_dropout"]["options"] = {}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "manifest.json").unlink()  # folders of version 0.1 have none
    again = sd.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("method", "options", "needed"),
    [
        ("competesmoe", {"max_layers": 1}, "predrawn"),
        ("competesmoe", {"epochs": 3}, "decreasing"),
        ("competesmoe2", {"warm_up": 0.1, "predrawn": False}, "predrawn"),
        ("momentumsmoe", {"beta1": 0.5}, "adam"),
    ],
)
def test_an_option_without_effect_is_named(method, options, needed):
    kind = load(METHODS, "method", method).options
    with pytest.warns(UserWarning, match=f"has no effect without {needed}"):
        build_options(kind, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_options(kind, options | {needed: True})
