"""Routers of other papers, and official gates, match their equations, written in numpy with loops over tokens and experts."""

import copy
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.methods.base import Forward
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.routers import LogitRouter
from tests import tiny
from tests.library.test_routers import linear, numpy, router, softmax, tokens
from tests.tiny import parse
from utils.flags.derive import method_of, parse_options
from utils.models.build import build_model, training_settings

N, E, D = 40, 6, 8
RATE = 0.25  # coefficient of the balance loss


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def scores(gate: nn.Module, x: torch.Tensor) -> np.ndarray:
    """W x + b, where there is a b."""
    return linear(gate, x) if gate.bias is not None else numpy(x) @ numpy(gate.weight).T


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Return whether a value is among the k largest of its row."""
    chosen = np.zeros(values.shape, dtype=bool)
    for row, mine in zip(chosen, values, strict=True):
        row[sorted(range(len(mine)), key=lambda e: -mine[e])[:k]] = True
    return chosen


def balance(p: np.ndarray, chosen: np.ndarray, of_tokens: bool = False) -> float:
    """The Switch loss over the columns, by their share of all choices or of the tokens."""
    total = len(chosen) if of_tokens else chosen.sum()
    return RATE * p.shape[1] * sum(chosen[:, e].sum() / total * p[:, e].mean() for e in range(p.shape[1]))


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
        left_out, s, order = s == 0, sigmoid(h), np.exp(h)
        for _ in range(gate.options.sinkhorn_steps):
            order = order / order.sum(0)
            order = order / order.sum(1, keepdims=True)
        order = np.where(left_out, 0, order)
    p = softmax(h).mean(0)
    return best(order, k), s * best(order, k), {"entropy": RATE * (p * np.log(p)).sum()}


def xmoe(gate, x, k, training):
    space = {name: numpy(parameter) for name, parameter in gate.space.items()}
    low, experts = numpy(x) @ space["projection"].T, numpy(gate.weight)
    cosines = np.array([[u @ v / np.sqrt((u @ u) * (v @ v)) for v in experts] for u in low])
    h, first = cosines / np.exp(space["log_temperature"]), 0.3 if gate.options.score == "softmax" else 0.07
    p = softmax(h) if gate.options.score == "softmax" else sigmoid(h)
    chosen = best(h, k)
    return chosen, p * chosen, {"balance": balance(softmax(cosines / first), chosen)} if training else {}


def remoe(gate, x, k, training):
    r = np.maximum(scores(gate, x), 0)
    chosen = (r > 0) & best(r, E if training else k)
    if not training:
        return chosen, r * chosen, {}
    use = chosen.sum(0) / N
    penalty = numpy(gate.before)
    assert gate.metrics()["active_experts"] == pytest.approx(use.sum())
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
    losses = {"balance": balance(p, chosen, of_tokens=True), "entropy": gate.options.entropy_loss * entropy}
    return chosen, p * chosen, losses if training else {}


def hyper_router(gate, x, k, training):
    made = numpy(gate.out) @ np.maximum(numpy(gate.hidden[0]) @ numpy(gate.embedding[0]), 0)
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
        losses["distillation"] = -0.3 * sum(np.log(softmax(d))[t][chosen[t]].mean() for t in range(N)) / N
        np.testing.assert_allclose(numpy(gate.table).T[ids % gate.options.router_vocabulary], d, rtol=1e-5, atol=1e-6)
    return chosen, s * chosen, losses


def adamoe(gate, x, k, training):
    h = np.concatenate([scores(gate, x), numpy(x) @ numpy(gate.nulls[0]).T], axis=1)
    every = h.shape[1]
    chosen = best(h, k * every // E)
    f = chosen.sum(0) / N
    f[E:] = f[E:].mean()
    rate = RATE if (gate.step or 0) < 50 else 0.005 * RATE
    losses = {"balance": rate * every * sum(f[j] * softmax(h)[:, j].mean() for j in range(every))} if training else {}
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
    "sigma_moe sinkhorn": (sigma_moe, {**BALANCED, "options": {"expert_dropout": 0.1, "selection": "sinkhorn"}}),
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


def built(name: str, step: int | None = None) -> nn.Module:
    """The router of a case, in training mode."""
    gate = router(name.split()[0], **CASES[name][1])
    gate.step, gate.total_steps = step, 100
    return gate


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CASES)
def test_matches_its_equations(name, training):
    reference, x = CASES[name][0], tokens(N)
    for k in (1, 2, E):
        for step in (5, 50) if reference in (stable_moe, adamoe) else (None,):
            gate = built(name, step).train(training)
            if reference is deepseek:
                gate.correction.copy_(torch.linspace(-0.2, 0.2, E))
            if reference is xmoe:
                nn.init.constant_(gate.space["log_temperature"], -0.5)  # as if trained
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


LOGITS = [name for name in ROUTERS if issubclass(load(ROUTERS, "router", name), LogitRouter) and name != "none"]


@pytest.mark.parametrize("name", LOGITS)
def test_a_reduced_router_scores_the_experts_that_are_left(name):
    """Every router with logits, in the order of the experts that surgery keeps, the first being a shared one."""
    gate, x = router(name).eval(), tokens(N)
    if "activation" in CASES.get(name, ({}, {}))[1]:
        pytest.skip("needs the experts")
    logits = gate.logits(x)
    gate.keep((0, 4, 2), 3)
    assert gate.num_experts == 3
    torch.testing.assert_close(gate.logits(x), logits[:, [0, 4, 2]])
    for k in (1, 3):
        indices = gate(x, k).indices_NK
        assert indices.shape[1] >= k and indices.max() < 3


WHOLE = ["deepseek", "sigma_moe", "remoe", "top_p", "z_loss", "stable_moe", "adamoe", "xmoe"]
SPLIT = (slice(0, 25), slice(25, N))


def losses_and_gradients(name: str, part: slice) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Losses, their gradient by the weight, and buffers after a training pass over a part of the tokens."""
    gate = built(name, 5)
    if gate.shared is not None:
        gate.shared.tokens = gate.shared.tokens[part]
    found = gate(tokens(N)[part], 2).losses
    sum(found.values()).backward()
    return {kind: loss.detach() for kind, loss in found.items()}, gate.weight.grad, dict(gate.named_buffers())


def work(folder: Path, rank: int) -> None:
    """Process of two, each with some of the tokens."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save({name: losses_and_gradients(name, SPLIT[rank]) for name in WHOLE}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_losses_of_two_processes_are_those_of_one(tmp_path):
    """Their means, weighted by tokens; and what a pass changes is the same in both."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: tiny.call(work, tmp_path, rank), range(2)))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in WHOLE:
        losses, gradient, buffers = losses_and_gradients(name, slice(0, N))
        shares = [(part.stop - part.start) / N for part in SPLIT]
        for kind, loss in losses.items():
            torch.testing.assert_close(sum(s * one[name][0][kind] for s, one in zip(shares, both, strict=True)), loss, msg=f"{name} {kind}")
        torch.testing.assert_close(sum(s * one[name][1] for s, one in zip(shares, both, strict=True)), gradient, msg=name)
        for one in both:
            assert one[name][2].keys() == buffers.keys()
            for key, buffer in buffers.items():
                torch.testing.assert_close(one[name][2][key], buffer, msg=f"{name} {key}")


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("none", "representative")])
def test_every_router_trains_at_a_k_drawn_for_each_layer(name):
    """From the command line to gradients; a k for each step is what test_contract.py tries."""
    words = [
        "--preset",
        "quick",
        "--gate_name",
        name,
        "--no_freeze_gate",
        "--moe_num_expert",
        "4",
        "--moe_top_k_min",
        "1",
        "--mem_len",
        "0",
    ]
    words += ["--d_model", "16", "--d_head", "8", "--n_head", "2", "--d_ff", "32", "--tgt_len", "6", "--eval_tgt_len", "6"]
    flags = parse([*words, "--method", "matryoshka"])
    torch.manual_seed(0)
    model, seen = build_model(flags).train(), []
    for _, layer in sd.moe_layers(model):
        layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.top_k))
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(256, (2, 6))
        method_of(flags).objective(model, lambda ids=ids: Forward(*model(ids, ids)), training_settings(flags, 1000)).total.backward()
    assert len(seen) == 6 and set(seen) <= {1, 2, 3, 4}
    assert any(one != other for one, other in zip(seen[::2], seen[1::2], strict=True))  # of the two layers
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert parse([*words, "--method", "elastic"]).dynamic_moe_mode == "elastic"


AT_1 = {"max_temp": 1.0, "min_temp": 1.0}
OFFICIAL = {
    "CustomDTSGate_softmax": ("dense_to_sparse", {"normalise": False, **AT_1}),
    "CustomDTSRandomGate": ("dense_to_sparse", {"assign": "random", **AT_1}),
    "CustomDTSRandomGate_softmax": ("dense_to_sparse", {"assign": "random", "normalise": False, **AT_1}),
    "CustomDenseGate": ("all_experts", {}),
    "CustomRandomGate_Dense": ("fixed", {}),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_stand_for_a_router_and_its_options(name):
    """In the library and on the command line, where options that are given take precedence."""
    router, options = OFFICIAL[name]
    config = sd.SMoEConfig(6, 1, router=name, options={"threshold": 0.1} if options else {})
    assert (config.router, config.options) == (router, {**options, "threshold": 0.1} if options else {})
    assert sd.SMoEConfig.from_json(config.to_json()) == config
    given = ["--method_options", "threshold=0.1,assign=learned"] if "assign" in options else []
    flags = parse(["--preset", "quick", "--moe", "--gate_name", name, *given])
    own = {**options, "threshold": "0.1", "assign": "learned"} if given else options
    assert (flags.gate_name, parse_options(flags.method_options)) == (router, {key: str(value) for key, value in own.items()})
    gates = [layer.router for _, layer in sd.moe_layers(build_model(flags))]
    assert all(
        getattr(gate.options, key) == ("learned" if key == "assign" and given else value)
        for gate in gates
        for key, value in options.items()
    )


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("constants", [1, 3])
def test_moe_plus_plus_matches_its_equations(constants, training):
    """Token by token, in a network of three layers whose experts are read from their tensors."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(D), nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, D))) for _ in range(3)]
    options = {"constants": constants, "tau": 0.4, "normalise": constants == 1}
    config = sd.SMoEConfig(
        E, 2, router="learned", method="moe_plus_plus", init_std=0.7, output_scale="dense", balance_loss=RATE, options=options
    )
    model, every = sd.moefy(nn.Sequential(*blocks), config).train(training), E + constants + 2
    seen: dict[nn.Module, torch.Tensor] = {}
    for _, layer in sd.moe_layers(model):
        layer.register_forward_hook(lambda layer, inputs, y: seen.update({layer: (inputs[0], y)}))
    for k in (1, 2, E):
        sd.set_top_k(model, k)
        model(tokens(N))
        before, loss = np.zeros((N, every)), 0.0
        for _, layer in sd.moe_layers(model):
            given, y = seen[layer]
            up, bias_up, down, bias_down = (numpy(getattr(layer.experts, name)) for name in ("up", "bias_up", "down", "bias_down"))
            h = np.concatenate([linear(layer.router, given), numpy(given) @ numpy(layer.special).T], axis=1)
            before = h = h if layer.residual is None else h + before @ numpy(layer.residual).T
            p, chosen, expected = softmax(h), best(h, k), np.zeros((N, D))
            for t, x in enumerate(numpy(given)):
                whole = max(p[t, :-1][chosen[t, :-1]].sum(), 1e-300) if options["normalise"] else 1.0
                for e in np.flatnonzero(chosen[t]):
                    if e < E:
                        out = np.maximum(up[e] @ x + bias_up[e], 0) @ down[e] + bias_down[e]
                    elif e < E + constants:
                        a = softmax(numpy(layer.mixes)[e - E] @ x)
                        out = a[0] * x + a[1] * numpy(layer.values)[e - E]
                    else:
                        out = x if e == E + constants else 0 * x
                    expected[t] += E * p[t, e] / whole * out
            np.testing.assert_allclose(numpy(y), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            weight = np.where(np.arange(every) < E, 1, 0.4)
            loss += RATE * sum(weight[e] * chosen[:, e].mean() * p[:, e].mean() for e in range(every)) if training else 0.0
            assert layer.mean_k() == pytest.approx(chosen[:, :E].sum() / N)
        assert sd.auxiliary_loss(model).item() == pytest.approx(loss, rel=1e-5)
    with pytest.raises(sd.ConfigError, match="residual = False"):
        sd.calibrate(model, [(lambda: model(tokens(N)), None)])


def after(steps: int, name: str, task=lambda routing: 0.0, **settings) -> tuple[nn.Module, list[sd.Routing]]:
    """A router trained by its losses and a task, always on the same tokens, at k = 2; and its routing in each step."""
    gate, routings = router(name, **settings).train(), []
    optimizer = torch.optim.Adam(gate.parameters(), 0.02)
    for step in range(steps):
        gate.step, gate.total_steps = step, steps
        routings.append(gate(tokens(N) + 0.5, 2))
        loss = task(routings[-1]) + sum(routings[-1].losses.values())
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return gate, routings


def experts_per_token(routings: list[sd.Routing]) -> float:
    return torch.stack([(routing.indices_NK >= 0).sum(1).double().mean() for routing in routings]).mean().item()


def test_losses_and_corrections_reach_what_they_are_for():
    """ReMoE and AdaMoE k experts per token, loss-free balance an even load, StableMoE a routing by id that is its teacher's and stays."""
    relu = after(400, "remoe", task=lambda routing: (routing.weights_NK.sum(1) - 1).square().mean())[1]
    assert experts_per_token(relu[:1]) > 2.7 and experts_per_token(relu[200:]) == pytest.approx(2, abs=0.3)
    null = after(200, "adamoe", balance_loss=1.0)[1]
    assert experts_per_token(null[100:]) == pytest.approx(2, abs=0.3)

    balanced = after(150, "deepseek", balance_loss=0.0, options={"correction_rate": 0.01})[1]
    loads = [torch.cat([one.indices_NK.flatten() for one in part]).bincount(minlength=E)[1:] for part in (balanced[:1], balanced[100:])]
    uneven, even = ((load.max() / load.double().mean()).item() for load in loads)  # without the shared expert
    assert uneven > 1.5 and even < 1.1

    options = {"router_vocabulary": N, "stage_one": 0.5, "distillation_loss": 10.0}
    gate, (*_, routing) = after(300, "stable_moe", balance_loss=0.0, options=options)
    teacher = gate.logits(tokens(N) + 0.5).topk(2).indices.sort().values  # which nothing has moved
    assert torch.equal(routing.indices_NK.sort().values, teacher)
    with torch.no_grad():
        gate.centroids.add_(1.0 * torch.randn_like(gate.centroids))
    assert torch.equal(gate(tokens(N).flip(0), 2).indices_NK, routing.indices_NK)
    assert torch.equal(gate.eval()(tokens(N), 2).indices_NK, routing.indices_NK)
