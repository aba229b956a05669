"""Routers of other papers, and official gates, match their equations, written in numpy with loops over tokens and experts."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.library.test_routers import linear, numpy, router, softmax, tokens

N, E, D = 40, 6, 8
RATE = 0.25  # coefficient of the balance loss


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def scores(gate: nn.Module, x: torch.Tensor) -> np.ndarray:
    """W x + b, where there is a b."""
    return linear(gate, x) if gate.bias is not None else numpy(x) @ numpy(gate.weight).T


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Whether a value is among the k largest of its row."""
    chosen = np.zeros(values.shape, dtype=bool)
    for row, mine in zip(chosen, values, strict=True):
        row[sorted(range(len(mine)), key=lambda e: -mine[e])[:k]] = True
    return chosen


def balance(p: np.ndarray, chosen: np.ndarray) -> float:
    """The Switch loss over the columns."""
    return RATE * p.shape[1] * sum(chosen[:, e].sum() / chosen.sum() * p[:, e].mean() for e in range(p.shape[1]))


def over(logits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Softmax over the chosen; rows of zeros without any."""
    e = np.where(chosen, np.exp(logits), 0)
    return e / np.maximum(e.sum(1, keepdims=True), 1e-300)


# each takes the gate, its input, k and whether it is in training, and returns what was chosen, weights and losses


def all_experts(gate, x, k, training):
    chosen = best(scores(gate, x), E if training else k)
    return chosen, over(scores(gate, x), chosen), {}


def fixed(gate, x, k, training):
    chosen = np.arange(E) < np.full((N, 1), k)
    return chosen, chosen / k, {}


def dense_to_sparse(gate, x, k, training):
    torch.manual_seed(7)
    h = scores(gate, x) if gate.options.assign == "learned" else numpy(torch.rand(N, E))
    if not training:
        chosen = best(h, k)
        return chosen, over(h, chosen) if gate.options.normalise else softmax(h) * chosen, {}
    p = softmax((h - np.log(numpy(torch.empty(N, E).exponential_()))) / 2.0)
    chosen = best(p, max(k, int((p > gate.options.threshold).sum(1).mean())))
    return chosen, p * chosen, {"balance": balance(softmax(h), chosen)}


def deepseek(gate, x, k, training):
    s, shared, correction = sigmoid(scores(gate, x)), gate.options.shared, numpy(gate.before)
    chosen = np.concatenate([np.arange(shared) < np.full((N, 1), k), best((s + correction)[:, shared:], max(0, k - shared))], axis=1)
    routed = s[:, shared:] * chosen[:, shared:]
    routed = gate.options.scale * routed / np.maximum(routed.sum(1, keepdims=True), 1e-300)
    weights = np.concatenate([chosen[:, :shared], routed], axis=1)
    if not training:
        return chosen, weights, {}
    load = chosen[:, shared:].sum(0)
    moved = correction + np.r_[np.zeros(shared), gate.options.correction_rate * np.sign(load.mean() - load)]
    np.testing.assert_allclose(numpy(gate.correction), moved, atol=1e-7)
    if k <= shared:
        return chosen, weights, {"balance": 0.0}
    p = s[:, shared:] / s[:, shared:].sum(1, keepdims=True)
    return chosen, weights, {"balance": balance(p, chosen[:, shared:])}


def sigma_moe(gate, x, k, training):
    h = scores(gate, x)
    s = sigmoid(h)
    if not training:
        return best(s, k), s * best(s, k), {}
    if gate.options.expert_dropout:
        torch.manual_seed(7)
        s = np.where(numpy(torch.rand(N, E)) < gate.options.expert_dropout, 0, s)
    order = s
    if gate.options.selection == "sinkhorn":
        order = np.exp(h)
        for _ in range(gate.options.sinkhorn_steps):
            order = order / order.sum(0)
            order = order / order.sum(1, keepdims=True)
    p = softmax(h).mean(0)
    return best(order, k), s * best(order, k), {"entropy": RATE * (p * np.log(p)).sum()}


def xmoe(gate, x, k, training):
    space = {name: numpy(parameter) for name, parameter in gate.space.items()}
    low, experts = numpy(x) @ space["projection"].T, numpy(gate.weight)
    h = np.array([[u @ v / np.sqrt((u @ u) * (v @ v)) for v in experts] for u in low]) / np.exp(space["log_temperature"])
    p = softmax(h) if gate.options.score == "softmax" else sigmoid(h)
    chosen = best(h, k)
    return chosen, p * chosen, {"balance": balance(p / p.sum(1, keepdims=True), chosen)} if training else {}


def remoe(gate, x, k, training):
    r = np.maximum(scores(gate, x), 0)
    chosen = (r > 0) & best(r, E if training else k)
    if not training:
        return chosen, r * chosen, {}
    use = chosen.sum(0) / N
    penalty = numpy(gate.before)
    assert gate.computed(k) == round(use.sum()) and gate.metrics()["active_experts"] == pytest.approx(use.sum())
    inactive = 1 - chosen.sum() / (N * E)
    assert gate.penalty.item() == pytest.approx(penalty * gate.options.alpha ** np.sign(1 - k / E - inactive))
    return chosen, r * chosen, {"sparsity": penalty * sum((E / k * use[e]) * r[:, e].mean() for e in range(E))}


def z_loss(gate, x, k, training):
    h = scores(gate, x)
    chosen = best(h, k)
    losses = {"balance": balance(softmax(h), chosen), "z": gate.options.z_loss * (np.log(np.exp(h).sum(1)) ** 2).mean()}
    return chosen, over(h, chosen), losses if training else {}


def top_p(gate, x, k, training):
    p = softmax(scores(gate, x))
    chosen = np.zeros((N, E), dtype=bool)
    for row, mine in zip(chosen, p, strict=True):
        for e in sorted(range(E), key=lambda e: -mine[e])[:k]:
            if mine[row].sum() >= gate.options.p:
                break
            row[e] = True
    entropy = -(p * np.log(p)).sum(1).mean()
    losses = {"balance": balance(p, chosen), "entropy": gate.options.entropy_loss * entropy}
    return chosen, p * chosen, losses if training else {}


def hyper_router(gate, x, k, training):
    made = numpy(gate.out) @ np.maximum(numpy(gate.hidden) @ numpy(gate.embedding[0]), 0)
    h = numpy(x) @ made[:, :-1].T + made[:, -1]
    return best(h, k), over(h, best(h, k)), {}


def expert_choice(gate, x, k, training):
    s = softmax(scores(gate, x))
    chosen = best(s.T, round(N * k / E)).T if training else best(s, k)
    return chosen, s * chosen, {}


def stable_moe(gate, x, k, training):
    s, ids = sigmoid(scores(gate, x)), np.arange(40)
    d = (numpy(gate.words[0]) @ numpy(gate.centroids).T)[ids % gate.options.router_vocabulary]
    learning = training and (gate.step or 0) / 100 < gate.options.stage_one
    frozen = numpy(gate.before).T[ids % gate.options.router_vocabulary]
    chosen = best(scores(gate, x) if learning else frozen, k)
    losses = {"balance": 0.0, "distillation": 0.0} if training else {}
    if learning:
        counts = chosen.sum(0)
        excess = (counts - counts.mean()) / counts.mean()
        losses["balance"] = RATE * sum((excess * s * chosen)[t].sum() for t in range(N)) / N
        losses["distillation"] = -sum(np.log(softmax(d))[t][chosen[t]].mean() for t in range(N)) / N
        np.testing.assert_allclose(numpy(gate.table).T[ids % gate.options.router_vocabulary], d, rtol=1e-5, atol=1e-6)
    return chosen, s * chosen, losses


def adamoe(gate, x, k, training):
    h, every = scores(gate, x), gate.weight.shape[0]
    chosen = best(h, k * every // E)
    f = chosen.sum(0) / chosen.sum()
    f[E:] = f[E:].mean()
    losses = {"balance": RATE * every * sum(f[j] * softmax(h)[:, j].mean() for j in range(every))} if training else {}
    return chosen[:, :E], over(h[:, :E], chosen[:, :E]), losses


def self_routing(gate, x, k, training):
    h = numpy(x)[:, :E]
    return best(h, k), over(h, best(h, k)), {}


BALANCED = {"balance_loss": RATE}
CASES = {
    "all_experts": (all_experts, {}),
    "fixed": (fixed, {}),
    "dense_to_sparse softmax": (dense_to_sparse, {**BALANCED, "options": {"normalise": False, "threshold": 0.1}}),
    "dense_to_sparse random": (dense_to_sparse, {**BALANCED, "options": {"assign": "random", "threshold": 0.1}}),
    "dense_to_sparse random softmax": (dense_to_sparse, {**BALANCED, "options": {"assign": "random", "normalise": False}}),
    "deepseek": (deepseek, BALANCED),
    "deepseek scaled": (deepseek, {**BALANCED, "options": {"shared": 2, "scale": 2.5, "correction_rate": 0.2}}),
    "deepseek without shared": (deepseek, {**BALANCED, "options": {"shared": 0}}),
    "sigma_moe": (sigma_moe, {**BALANCED, "options": {"expert_dropout": 0.0}}),
    "sigma_moe dropout": (sigma_moe, {**BALANCED, "options": {"expert_dropout": 0.3}}),
    "sigma_moe sinkhorn": (sigma_moe, {**BALANCED, "options": {"expert_dropout": 0.0, "selection": "sinkhorn"}}),
    "xmoe": (xmoe, BALANCED),
    "xmoe sigmoid": (xmoe, {**BALANCED, "options": {"score": "sigmoid", "router_dim": 5}}),
    "remoe": (remoe, BALANCED),
    "z_loss": (z_loss, BALANCED),
    "top_p": (top_p, BALANCED),
    "top_p of more": (top_p, {**BALANCED, "options": {"p": 0.9, "entropy_loss": 0.1}}),
    "hyper_router": (hyper_router, {"options": {"hyper_size": 16}}),
    "expert_choice": (expert_choice, {}),
    "stable_moe": (stable_moe, {**BALANCED, "options": {"router_vocabulary": 16}}),
    "adamoe": (adamoe, BALANCED),
    "adamoe of many": (adamoe, {**BALANCED, "options": {"null_experts": 3}}),
    "self_routing": (self_routing, {}),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CASES)
def test_matches_its_equations(name, training):
    reference, settings = CASES[name]
    x = tokens(N)
    for k in (1, 2, E):
        for step in (5, 50) if reference is stable_moe else (None,):
            gate = router(name.split()[0], **settings).train(training)
            if reference is deepseek:
                gate.correction.copy_(torch.linspace(-0.2, 0.2, E))
            gate.step, gate.total_steps = step, 100
            gate.before = copy.deepcopy(next(iter(gate.buffers()), None))  # what this pass changes: the only buffer, or the first
            torch.manual_seed(7)
            indices, weights, losses, _ = gate(x, k)
            chosen, expected, expected_losses = reference(gate, x, k, training)
            found = torch.zeros(N, E + 1, dtype=torch.float64).scatter_add(1, indices % (E + 1), weights.detach().double())
            taken = torch.zeros(N, E + 1, dtype=torch.bool).scatter(1, indices % (E + 1), True)  # none, -1, is the last column
            np.testing.assert_array_equal(taken[:, :E].numpy(), chosen)
            np.testing.assert_allclose(found[:, :E].numpy(), expected, rtol=2e-5, atol=1e-7)
            assert losses.keys() == expected_losses.keys()
            for kind, loss in expected_losses.items():
                assert losses[kind].item() == pytest.approx(loss, rel=2e-5, abs=1e-7), (kind, k)
