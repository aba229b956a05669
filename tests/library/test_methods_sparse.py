"""Methods with experts match their equations, written in numpy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import smoe_dropout as sd
from smoe_dropout.competition import competing_layers
from smoe_dropout.methods import sandwich, thor
from smoe_dropout.methods.base import Forward, Settings
from tests.conftest import REFERENCE
from tests.library.test_library import Net, tokens
from tests.library.test_moefy import transformer_xl
from tests.library.test_routers import about, numpy, softmax

D, E = 8, 4


def sparse(model: nn.Module, **settings) -> nn.Module:
    """Convert to experts, with nonzero biases of routers and experts."""
    config = sd.SMoEConfig(**{"num_experts": E, "top_k": 2, "router": "learned", "init_std": 0.5, **settings})
    torch.manual_seed(0)
    for _, layer in sd.moe_layers(sd.moefy(model, config)):
        for tensor in (layer.experts.bias_up, layer.experts.bias_down, *(p for n, p in layer.router.named_parameters() if n == "bias")):
            nn.init.normal_(tensor, 0.0, 0.5)
    return model


def responses(layer: sd.MoELayer, x: np.ndarray) -> np.ndarray:
    """Outputs E_i(x) of all experts [N, E, D]."""
    e = layer.experts
    up, bias_up, down, bias_down = (numpy(parameter) for parameter in (e.up, e.bias_up, e.down, e.bias_down))
    return np.stack([np.maximum(x @ up[i].T + bias_up[i], 0) @ down[i] + bias_down[i] for i in range(E)], 1)


def logits(layer: sd.MoELayer, x: np.ndarray) -> np.ndarray:
    return x @ numpy(layer.router.weight).T + numpy(layer.router.bias)


def best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores of each row, and their indices."""
    indices = np.argsort(-scores)[:, :k]
    return np.take_along_axis(scores, indices, 1), indices


def mixture(outputs: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (np.take_along_axis(outputs, indices[..., None], 1) * weights[..., None]).sum(1)


def plain_smoe(layer: sd.MoELayer, x: np.ndarray) -> np.ndarray:
    kept, indices = best(logits(layer, x), layer.top_k)
    return mixture(responses(layer, x), indices, softmax(kept))


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (softmax(a) * (np.log(softmax(a)) - np.log(softmax(b)))).sum(-1)


def cross_entropy(x: np.ndarray, targets: torch.Tensor) -> float:
    return -np.log(np.take_along_axis(softmax(x), targets.numpy()[..., None], -1)).mean()


def close(ours: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(numpy(ours).reshape(expected.shape), expected, rtol=1e-4, atol=2e-5)


class Recorded:
    """Forward passes over one segment, recording results, k, and the chosen experts of each layer."""

    def __init__(self, model: nn.Module):
        ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(2))
        self.model, self.ids, self.targets, self.passes, self.drawn, self.ks = model, ids[:, :-1], ids[:, 1:], [], [], []

    def __call__(self) -> Forward:
        self.passes.append(Forward(*self.model(self.ids, self.targets)))
        self.drawn.append([layer.assigned.clone() for _, layer in sd.moe_layers(self.model)])
        self.ks.append(sd.get_top_k(self.model))
        return self.passes[-1]


def test_thor_consistency_matches_the_reference_file():
    file = load_file(REFERENCE / "thor_consistency.safetensors")
    a, b = file["logits_a"], file["logits_b"]
    expected = file["symmetric_kl_per_row"] * a.shape[-1] / 2  # the file has a mean over classes without the factor 1/2
    torch.testing.assert_close(thor.symmetric_kl(a, b), expected, rtol=1e-5, atol=1e-6)
    close(thor.symmetric_kl(a, b), (kl(numpy(a), numpy(b)) + kl(numpy(b), numpy(a))) / 2)


THOR = {"method": "thor", "router": "none", "top_k": 1}


def test_thor_trains_one_expert_for_the_whole_batch():
    model, x, counts = sparse(Net(2), **THOR), tokens(3, 5), np.zeros((E, E))
    torch.manual_seed(3)
    for _ in range(600):
        model(x)
        assert all(layer.assigned.shape == (15, 1) and len(layer.assigned.unique()) == 1 for layer in model.layers)
        counts[tuple(int(layer.assigned[0]) for layer in model.layers)] += 1
    assert all(about(count, 600, 1 / E**2) for count in counts.flatten())  # uniform, and layers draw independently
    output = model.layers[0](x)
    close(output, responses(model.layers[0], numpy(x).reshape(15, D))[:, int(model.layers[0].assigned[0])])


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
def test_thor_objective(alpha):
    model = sparse(transformer_xl(dropout=0.0), **THOR).train()
    torch.manual_seed(4)
    forward = Recorded(model)
    objective = thor.objective(model, forward, Settings(1, 1, thor.Options(alpha=alpha), 1000))
    assert len(forward.passes) == 2 and any(not torch.equal(a, b) for a, b in zip(*forward.drawn, strict=True))
    p, q = (numpy(one.logits) for one in forward.passes)
    entropies = cross_entropy(p, forward.targets) + cross_entropy(q, forward.targets)
    assert objective.total.item() == pytest.approx(entropies + alpha * (kl(p, q) + kl(q, p)).mean() / 2, rel=1e-5)
    assert objective.nll.item() == pytest.approx(entropies / 2, rel=1e-5) and objective.state is forward.passes[0].state
    objective.total.backward()
    drawn = {(layer, int(one[0])) for both in forward.drawn for layer, one in enumerate(both)}
    for index, (_, layer) in enumerate(sd.moe_layers(model)):
        assert [bool(gradient.any()) for gradient in layer.experts.up.grad] == [(index, expert) in drawn for expert in range(E)]


@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("inference", ["sentence", "token"])
def test_thor_inference(inference, k):
    layer, x = sparse(Net(1), **{**THOR, "top_k": k}, options={"inference": inference}).layers[0].eval(), tokens(30, 20)
    torch.manual_seed(5)
    output = layer(x)
    assert all(len(set(row)) == k for row in layer.assigned.tolist())
    assert len(layer.assigned.sort().values.unique(dim=0)) == math.comb(E, k)  # every subset of experts occurred
    lanes = layer.assigned.view(30, 20, k)
    assert bool((lanes == lanes[:, :1]).all()) == (inference == "sentence")
    outputs = responses(layer, numpy(x).reshape(600, D))
    close(output, np.stack([outputs[n, row].mean(0) for n, row in enumerate(layer.assigned.numpy())]))
    if k == E:
        close(output, outputs.mean(1))
    assert k == E or not torch.equal(layer(x), output)
    torch.manual_seed(5)
    assert torch.equal(layer(x), output)


OURS = {"target": "all", "detach": True, "times_balance": False}  # our reading of the first paper


def compete(n_layer: int = 1, **options) -> Net:
    return sparse(Net(n_layer), method="competesmoe", options=options)


def affinity_of(each: np.ndarray, affinity: str) -> np.ndarray:
    return np.sqrt((each**2).sum(-1)) if affinity == "norm" else np.log1p(np.exp(each)).mean(-1)


@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("affinity", ["norm", "softplus"])
def test_competition(affinity, k):
    layer, x = compete(affinity=affinity, router_loss=0.5, **OURS).layers[0], tokens(20)
    layer.top_k = k
    output = layer(x)
    each = responses(layer, numpy(x))
    kept, indices = best(s := affinity_of(each, affinity), k)
    np.testing.assert_array_equal(layer.assigned.numpy(), indices)
    close(output, mixture(each, indices, softmax(kept) if affinity == "norm" else kept / kept.sum(1, keepdims=True)))
    expected = ((softmax(logits(layer, numpy(x))) - softmax(s)) ** 2).mean()
    assert layer.losses.keys() == {"router"} and layer.losses["router"].item() == pytest.approx(0.5 * expected, rel=1e-4)
    assert layer.competed and layer.computed_experts == E


@pytest.mark.parametrize("affinity", ["norm", "softplus"])
def test_distillation_trains_the_router_and_no_expert(affinity):
    layer, x = compete(affinity=affinity, router_loss=1.0, **OURS).layers[0], tokens(20)
    output, parameters = layer(x), [layer.router.weight, layer.router.bias, *layer.experts.parameters()]
    weight, bias, *rest = torch.autograd.grad(layer.losses["router"], parameters, allow_unused=True, retain_graph=True)
    assert rest == [None] * 4
    p, s = softmax(logits(layer, numpy(x))), softmax(affinity_of(responses(layer, numpy(x)), affinity))
    towards_p = 2 * (p - s) / p.size  # derivative of the mean of squares, then of the softmax and the linear map
    towards_logits = p * (towards_p - (towards_p * p).sum(1, keepdims=True))
    np.testing.assert_allclose(numpy(weight), towards_logits.T @ numpy(x), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(numpy(bias), towards_logits.sum(0), rtol=1e-3, atol=1e-7)
    *router, a, b, c, d = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    assert router == [None] * 2 and all(grad.any() for grad in (a, b, c, d))


def test_other_steps_use_the_learned_router():
    never, always, plain, x = compete(2, flip_rate=0.0), compete(2, flip_rate=1.0).eval(), sparse(Net(2)), tokens(20)
    assert torch.equal(never(x), plain(x))
    assert torch.equal(sd.auxiliary_loss(never), sd.auxiliary_loss(plain)) and sd.auxiliary_loss(plain) > 0
    assert [(int(layer.passes), int(layer.competitions)) for layer in never.layers] == [(1, 0)] * 2
    assert torch.equal(always(x), plain.eval()(x)) and sd.auxiliary_loss(always) == 0  # no competition in evaluation
    assert [(layer.competed, int(layer.passes)) for layer in always.layers] == [(False, 0)] * 2
    close(plain.layers[0](x), plain_smoe(plain.layers[0], numpy(x)))


def competed_steps(model: Net, steps: int) -> np.ndarray:
    """Mask of competing layers at each step [steps, layers]."""
    found, x = [], tokens(1)
    for step in range(steps):
        sd.set_progress(model, step, steps)
        with torch.no_grad():
            model(x)
        found.append([layer.competed for layer in model.layers])
    return np.array(found)


def test_competition_steps_are_a_function_of_seed_and_step():
    model, same, other = (compete(3, flip_rate=0.3) for _ in range(3))
    for made, seed in ((model, 1), (same, 1), (other, 2)):
        for layer in made.layers:
            layer.seed.fill_(seed)
    generator = torch.get_rng_state()
    found, other = competed_steps(model, 200), competed_steps(other, 200)
    assert torch.equal(torch.get_rng_state(), generator)  # torch's generator was not used
    torch.manual_seed(7)
    assert (found == competed_steps(same, 200)).all() and (found != other).any(1).sum() > 50
    assert all(set(np.flatnonzero(row)) == competing_layers(1, step, 3, 0.3, 3) for step, row in enumerate(found))
    assert all(about(count, 200, 0.3) for count in found.sum(0))
    assert all(about((found[:, a] & found[:, b]).sum(), 200, 0.09) for a, b in ((0, 1), (0, 2), (1, 2)))  # layers draw independently


def test_without_a_step_layers_draw_from_torchs_generator():
    model, x, found = compete(2, flip_rate=0.4), tokens(1), []
    torch.manual_seed(6)
    for _ in range(100):
        model(x)
        found.append([layer.competed for layer in model.layers])
    torch.manual_seed(6)
    assert found == (torch.rand(200) < 0.4).view(100, 2).tolist() and about(np.sum(found), 200, 0.4)


def test_predrawn_competition():
    model = compete(5, flip_rate=0.5, predrawn=True, moved=False, max_layers=2, warm_up=0.25)
    with pytest.warns(UserWarning, match="no layer competes before .*set_progress"):
        model(tokens(2))
    assert not any(layer.competed for layer in model.layers)
    found = competed_steps(model, 240)
    assert not found[:60].any() and set(found[60:].sum(1)) == {0, 1, 2}
    # each layer is drawn with 1/2 and then kept among at most two: sum over the number of others drawn
    share = sum(math.comb(4, n) / 2**5 * min(1, 2 / (n + 1)) for n in range(5))
    assert all(about(count, 180, share) for count in found[60:].sum(0))


def test_competitions_are_counted_saved_and_reported():
    model, twin, expected = compete(2, flip_rate=0.3), compete(2, flip_rate=0.3), {}
    found = competed_steps(model, 50)
    twin.load_state_dict(model.state_dict())
    for index, share in enumerate(found.mean(0)):
        expected[f"layers.{index}.competition_share"] = pytest.approx(share)
        expected[f"layers.{index}.extra_expert_flops"] = pytest.approx(share * (E - 2) / 2)
    assert found.any() and sd.method_metrics(model) == sd.method_metrics(twin) == expected


def unrolled(model: Net, x: np.ndarray, mu=0.7, gamma=1.0, adam=False, adam_gamma=1.0, beta1=0.9, beta2=0.999, own_norm=True) -> np.ndarray:
    """Output of the residual stack by the recurrence m <- mu m + gamma f(x); x <- x + m, or with a norm of the layer x + LN(x - m)."""
    m = np.zeros_like(x)
    for index, layer in enumerate(model.layers):
        f = plain_smoe(layer, x)
        m = mu * m + gamma * f
        adaptive = adam_gamma * (1 - beta1) * f / np.sqrt((1 - beta2) * f**2 + 1e-8)
        step = adaptive if adam and index == 0 else m
        if own_norm:
            inner = x - (adaptive + x) if adam and index == 0 else x - m  # as the authors write it: what they add to the step cancels
            centred = inner - inner.mean(-1, keepdims=True)
            step = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * numpy(layer.norm.weight) + numpy(layer.norm.bias)
        x = x + step
    return x


def with_norms(model: Net) -> Net:
    """The model with gains and biases of its layers' norms that are neither 1 nor 0."""
    draw = torch.Generator().manual_seed(8)
    for layer in model.layers:
        for parameter in layer.norm.parameters() if layer.norm else ():
            parameter.data.add_(torch.randn(D, generator=draw), alpha=0.3)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("own_norm", [True, False])
@pytest.mark.parametrize("options", [{}, {"mu": 0.9, "gamma": 0.5}, {"adam": "1"}, {"adam": "1", "adam_gamma": 0.3, "beta2": 0.9}], ids=str)
def test_momentum_over_depth(options, n_layer, training, own_norm):
    options = {**options, "own_norm": own_norm}
    model = with_norms(sparse(Net(n_layer), method="momentumsmoe", options=options, init_std=0.3)).train(training)
    x = tokens(5, 4)
    first, second = model(x), model(x)
    close(first, unrolled(model, numpy(x).reshape(20, D), **options))
    assert torch.equal(first, second) and model.layers[0].shared.carried is None
    assert all(layer.shared is model.layers[0].shared for layer in model.layers)


def test_interrupted_pass_leaves_no_momentum():
    model, x = sparse(Net(3), method="momentumsmoe"), tokens(9)
    expected = model(x)
    model.layers[1](model.layers[0](tokens(4)))
    twin = copy.deepcopy(model)
    assert model.layers[0].shared.carried is not None and twin.layers[0].shared.carried is None
    assert torch.equal(model(x), expected) and model.layers[0].shared.carried is None


def test_momentum_follows_the_order_of_the_model_not_of_config_layers():
    model, x = sparse(Net(3), method="momentumsmoe", layers=(2, 0, 1)), tokens(9)
    for _ in range(2):
        close(model(x), unrolled(model, numpy(x)))
    assert [layer.index for layer in model.layers] == [0, 1, 2] and model.layers[0].shared.carried is None


def check_route(layer: sd.MoELayer, mixed: np.ndarray, x: torch.Tensor) -> None:
    """Assert that the k largest of `mixed` [B, T, E] choose and their softmax weighs."""
    routing, (kept, indices) = layer.route(x), best(mixed.reshape(-1, E), layer.top_k)
    np.testing.assert_array_equal(routing.indices_NK.numpy(), indices)
    close(routing.weights_NK, softmax(kept))


@pytest.mark.parametrize(("tau", "expected_tau"), [(0.0, math.sqrt(D)), (0.5, 0.5)])
@pytest.mark.parametrize("k", [1, 3])
def test_similarity(tau, expected_tau, k):
    layer = sd.moe_layers(sparse(transformer_xl(), method="similarity", top_k=k, options={"tau": tau}))[0][1]
    assert torch.equal(layer.similarity, torch.eye(D)) and layer.similarity.requires_grad
    nn.init.normal_(layer.similarity, 0.0, 0.5)
    x, mixed = tokens(3, 7), np.zeros((3, 7, E))
    u, W = numpy(x), numpy(layer.similarity)
    for b, i in itertools.product(range(3), range(7)):
        e = logits(layer, u[b, : i + 1])
        mixed[b, i] = softmax(np.array([u[b, i] @ W @ u[b, j] / expected_tau for j in range(i + 1)])) @ e
    check_route(layer, mixed, x)


def plain_attention(attention: nn.Module, inputs: tuple) -> np.ndarray:
    """Probabilities [B, H, T, M + T] of relative attention, term by term: ((q + u) k + (q + v) r[distance]) / sqrt(C)."""
    x, memory, positions, bias, _mask = (numpy(tensor) for tensor in inputs)
    u, v = bias[:, :, 0, 0]
    H, C, M, T = attention.n_head, attention.d_head, memory.shape[1], x.shape[1]
    weight, p = numpy(attention.qkv.weight), np.zeros((len(x), H, T, M + T))
    q, k = x @ weight[: H * C].T, np.concatenate([memory, x], 1) @ weight[H * C : 2 * H * C].T
    r = (positions @ numpy(attention.position.weight).T)[::-1]  # r[distance]
    for b, h, i in itertools.product(range(len(x)), range(H), range(T)):
        own = slice(h * C, (h + 1) * C)
        scores = [(q[b, i, own] + u[h]) @ k[b, j, own] + (q[b, i, own] + v[h]) @ r[i + M - j, own] for j in range(i + M + 1)]
        p[b, h, i, : i + M + 1] = softmax(np.array(scores) / math.sqrt(C))
    return p


@pytest.mark.parametrize("dropatt", [0.0, 0.4])
@pytest.mark.parametrize("segments", [1, 2])
def test_attention(segments, dropatt):
    model = copy.deepcopy(sparse(transformer_xl(n_head=3, dropout=0.0, dropatt=dropatt), method="attention").train())
    seen, memory, heads = {}, None, set()
    for decoder in model.layers:
        for module in (decoder.attention, decoder.feed_forward.core):
            module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs))
    for ids in torch.randint(11, (segments, 3, 6), generator=torch.Generator().manual_seed(2)):
        _, memory = model.hidden(ids, memory)
    for decoder in model.layers:
        layer, p = decoder.feed_forward.core, plain_attention(decoder.attention, seen[decoder.attention])
        assert layer.attention is decoder.attention and not layer.attention.probabilities.requires_grad
        close(layer.attention.probabilities, p)
        x, entropy, mixed = seen[layer][0], -(p * np.log(np.where(p > 0, p, 1))).sum(-1), np.zeros((3, 6, E))
        for b, i in itertools.product(range(3), range(6)):
            head = min(range(3), key=lambda h: entropy[b, h, : i + 1].mean())
            A = p[b, head, i, -6:]
            mixed[b, i] = sum(A[j] * logits(layer, numpy(x)[b, j]) for j in range(i + 1)) / A.sum()
            heads.add(head)
        check_route(layer, mixed, x)
    assert len(heads) > 1  # otherwise the choice of the head would not be tested


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["similarity", "attention"])
def test_routes_do_not_depend_on_later_tokens(method, seed):
    """Bit for bit, in every layer, for a segment with memory."""
    model, routes = sparse(transformer_xl(n_layer=3, mem_len=9), method=method), {}
    for _, layer in sd.moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda experts, inputs: routes.__setitem__(experts, [x.view(2, 24, 2) for x in inputs[1:]]))
    draw = torch.Generator().manual_seed(seed)
    before, ids = torch.randint(11, (2, 2, 24), generator=draw)
    _, memory = model.hidden(before)
    model.hidden(ids, memory)
    expected, elsewhere = dict(routes), 0
    for cut in (1, 5, 12, 23):
        changed = ids.clone()
        changed[:, cut:] = (ids[:, cut:] + torch.randint(1, 11, ids[:, cut:].shape, generator=draw)) % 11
        model.hidden(changed, memory)
        for experts, found in routes.items():
            assert all(torch.equal(ours[:, :cut], theirs[:, :cut]) for ours, theirs in zip(found, expected[experts], strict=True))
            elsewhere += (found[0][:, cut:] != expected[experts][0][:, cut:]).sum().item()
    assert elsewhere > 100


@pytest.mark.parametrize("method", ["similarity", "attention"])
def test_model_without_attention_is_rejected_and_unchanged(method):
    model = nn.Sequential(nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D)))
    modules, state = list(model.modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(sd.ConfigError, match="no attention module"):
        sparse(model, method=method)
    assert list(model.modules()) == modules and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("drawn", [1, 3, E])
def test_sandwich_objective(drawn):
    model = sparse(transformer_xl(), router="random", top_k=drawn)
    forward = Recorded(model)
    objective = sandwich.objective(model, forward, Settings(1, E, None, 1000))
    assert forward.ks == [E, 1, drawn] and sd.get_top_k(model) == drawn and objective.state is forward.passes[0].state
    largest, smallest, between = (numpy(one.logits) for one in forward.passes)
    nll, apart = cross_entropy(largest, forward.targets), kl(largest, smallest).mean()
    assert apart > 1e-3 and objective.nll.item() == pytest.approx(nll, rel=1e-5)
    assert objective.total.item() == pytest.approx((nll + apart + kl(largest, between).mean()) / 3, rel=1e-5)
    # gradient of the output bias: p - target for the largest k, p - p_max for the others, since p_max is detached
    expected = softmax(smallest) + softmax(between) - softmax(largest) - np.eye(11)[forward.targets.numpy()]
    close(torch.autograd.grad(objective.total, model.head.bias)[0], expected.mean((0, 1)) / 3)


@pytest.mark.parametrize(("low", "high"), [(1, 4), (8, 16), (3, 3)])
def test_elastic_k_is_uniform_over_its_range(low, high):
    steps, p = 3000, 1 / (high - low + 1)
    schedule, *others = (sd.TopKSchedule("elastic", low, high, steps, seed) for seed in (0, 0, 1))
    one, same, other = ([each(step) for step in range(steps)] for each in (schedule, *others))
    assert one == same and set(one) == set(range(low, high + 1)) and all(about(one.count(k), steps, p) for k in set(one))
    for pairs in (zip(one[1:], other[1:], strict=True), itertools.pairwise(one)):  # seeds and steps draw independently
        assert about(sum(a == b for a, b in pairs), steps - 1, p)
    assert [schedule(step) for step in (7, 5, 7)] == [one[7], one[5], one[7]]  # independent of earlier calls
    assert [schedule(step) for step in (steps, steps + 1, 10**9)] == [high] * 3
