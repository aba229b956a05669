"""The microscope against brute force: loops over the tokens that the experts were given, and planted faults."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smoe_dropout as sd
from smoe_dropout.microscope import fluctuation, measures, saturation
from smoe_dropout.registry import ROUTERS
from tests.library import test_native
from tests.library.test_contract import SPARSE, build, text

E, V, D = 6, 11, 8


class Model(nn.Module):
    """Three residual FFNs between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(D, 36), nn.ReLU(), nn.Linear(36, D)) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for ffn in self.ffns:
            x = x + ffn(x)
        return self.head(x)


def made(seed: int = 0, **settings) -> Model:
    torch.manual_seed(seed)
    return sd.moefy(Model(), sd.SMoEConfig(**{"num_experts": E, "top_k": 2, "router": "learned", "init_std": 0.5, **settings})).double()


TEXTS = [torch.randint(V, (2, 7 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)]
MASKS = [torch.rand(ids.shape, generator=torch.Generator().manual_seed(9)) < 0.7 for ids in TEXTS]


def passes(model: nn.Module, masks=None) -> list:
    runs = [lambda ids=ids: (model(ids), (ids + 1) % V) for ids in TEXTS]
    return runs if masks is None else list(zip(runs, masks, strict=True))


def seen(model: nn.Module, k: int | None, masks=None) -> list[tuple[Tensor, list[set[int]]]]:
    """For each layer the inputs of each pass and the experts of each token, as the experts are given them."""
    found = [([], []) for _ in sd.moe_layers(model)]
    real = [slice(None)]

    def hook(place):
        def see(_experts, given):
            keep = real[0]
            found[place][0].append(given[0][keep])
            found[place][1].extend({e for e in row.tolist() if e >= 0} for row in given[1][keep])

        return see

    hooks = [layer.experts.register_forward_pre_hook(hook(place)) for place, (_, layer) in enumerate(sd.moe_layers(model))]
    with torch.no_grad(), sd.top_k(model, k):
        for index, ids in enumerate(TEXTS):
            real[0] = masks[index].flatten() if masks else slice(None)
            model.eval()(ids)
    for each in hooks:
        each.remove()
    return found


def outputs(layer: nn.Module, x_ND: Tensor) -> np.ndarray:
    """Outputs of all experts [N, E, D], one expert after another."""
    ones = torch.ones(len(x_ND), 1, dtype=x_ND.dtype)
    each = [layer.experts(x_ND, torch.full((len(x_ND), 1), e), ones) for e in range(layer.num_experts)]
    return torch.stack(each, 1).detach().numpy()


def hsic(K: np.ndarray, L: np.ndarray) -> float:
    """HSIC_1 of Song et al. 2012, in its traces and sums."""
    n, one = len(K), np.ones(len(K))
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    total = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    return total / (n * (n - 3))


def rank(rows: np.ndarray) -> float:
    values = np.linalg.svd(rows, compute_uv=False)
    values = values[values > 1e-12] / values.sum()
    return math.exp(-(values * np.log(values)).sum())


CASES = {
    "random, all tokens": ({"router": "random"}, 2, None),
    "learned, masked": ({}, 3, MASKS),
    "at k = E": ({}, E, None),
    "unnormalised": ({"router": "scored", "options": {"normalise": False, "score": "sigmoid"}}, 2, None),
    "a shared expert": ({"shared_experts": 1, "gate_weight": "unit"}, 3, MASKS),
    "hash, without logits": ({"router": "hash"}, 2, None),
}


@pytest.mark.parametrize(("settings", "k", "masks"), CASES.values(), ids=CASES)
def test_every_measure_equals_brute_force(settings, k, masks):
    model = made(**settings)
    report = sd.examine(model, passes(model, masks), k=k, ks=(1, E), sample=99)
    for layer, (name, own), (inputs, chosen) in zip(report.layers, sd.moe_layers(model), seen(model, k, masks), strict=True):
        S = own.config.shared_experts
        chosen = [{e - S for e in experts if e >= S} for experts in chosen]
        N, R = len(chosen), E - S
        counts = [sum(e in experts for experts in chosen) for e in range(R)]
        load = np.array(counts) / sum(counts)
        assert (report.tokens, layer.name, layer.mean_k) == (N, name, k - S) and layer.load == pytest.approx(load)
        assert layer.load_entropy == pytest.approx(-sum(p * math.log(p) for p in load if p) / math.log(R))
        assert layer.load_variation == pytest.approx(load.std() / load.mean()) and layer.load_max == pytest.approx(load.max() * R)
        assert layer.dead == [e + S for e in range(R) if load[e] * R < 0.01]
        for i, j in itertools.product(range(R), repeat=2):
            both = sum({i, j} <= experts for experts in chosen)
            assert layer.co_activation[i][j] == pytest.approx(both / counts[i] if counts[i] else 0)
        by_pass = [outputs(own, x_ND) for x_ND in inputs]
        all_NED = np.concatenate(by_pass)
        unit_NED = all_NED / np.linalg.norm(all_NED, axis=-1, keepdims=True).clip(1e-30)
        sums = {
            pair: sum(hsic(*(one[:, e] @ one[:, e].T for e in pair)) for one in by_pass) for pair in itertools.product(range(E), repeat=2)
        }
        for i, j in sums:
            assert layer.cosine[i][j] == pytest.approx((unit_NED[:, i] * unit_NED[:, j]).sum(-1).mean(), abs=1e-9)
            assert layer.cka[i][j] == pytest.approx(sums[i, j] / math.sqrt(sums[i, i] * sums[j, j]), abs=1e-9)
        off = ~np.eye(E, dtype=bool)
        assert layer.mean_cosine == pytest.approx(np.array(layer.cosine)[off].mean()) and report.sampled == N
        assert layer.mean_cka == pytest.approx(np.array(layer.cka)[off].mean())
        assert layer.effective_rank == pytest.approx(rank(all_NED.transpose(1, 0, 2).reshape(E, -1)))
        rows = [torch.cat([tensor[e].flatten() for tensor in own.experts.weights(torch.float64)[:4]]) for e in range(E)]
        assert layer.weight_rank == pytest.approx(rank(torch.stack(rows).detach().numpy()))
        if settings.get("router") == "hash":
            assert layer.confidence is None and layer.margin is None
            continue
        logits_NE = torch.cat([own.router.logits(x_ND) for x_ND in inputs]).detach()
        p_NE = logits_NE.sigmoid() / logits_NE.sigmoid().sum(1, keepdim=True) if "options" in settings else logits_NE.softmax(1)
        p_NE = p_NE[:, S:].tolist()
        assert layer.confidence == pytest.approx(np.mean([max(row) for row in p_NE]))
        gaps = (
            [min(row[e] for e in experts) - max(row[e] for e in {*range(R)} - experts) for row, experts in zip(p_NE, chosen, strict=True)]
            if k < E
            else []
        )
        assert layer.margin == (pytest.approx(np.mean(gaps)) if gaps else None)


@pytest.mark.parametrize("k", [1, 3, E])
def test_loss_and_calibration_equal_brute_force(k):
    model = made()
    with torch.no_grad(), sd.top_k(model, k):
        log_NV = torch.cat([F.log_softmax(model(ids).float(), -1).flatten(0, 1) for ids in TEXTS])
    targets = [(token + 1) % V for ids in TEXTS for token in ids.flatten().tolist()]
    bins = [[] for _ in range(15)]
    for row, target in zip(log_NV.exp().tolist(), targets, strict=True):
        bins[math.ceil(max(row) * 15) - 1].append((max(row), row.index(max(row)) == target))
    error = sum(abs(sum(right for _, right in one) - sum(sure for sure, _ in one)) for one in bins) / len(targets)
    report = sd.examine(model, passes(model), k=2, ks=(E, 3, 2, 1), without=False)
    assert [one.k for one in report.by_k] == [1, 2, 3, E] and {layer.loss_without_first for layer in report.layers} == {None}
    (found,) = (one for one in report.by_k if one.k == k)
    assert found.loss == pytest.approx(-np.mean([row[target] for row, target in zip(log_NV.tolist(), targets, strict=True)]))
    assert found.calibration_error == pytest.approx(error, abs=1e-6)
    assert found.accuracy == np.mean([right for one in bins for _, right in one])


@pytest.mark.parametrize(
    ("settings", "k"),
    [
        ({}, 2),
        ({}, E),
        ({"gate_weight": "uniform"}, 3),
        ({"gate_weight": "sigmoid"}, 2),
        ({"gate_weight": "unit", "shared_experts": 1}, 3),
        ({"router": "scored", "options": {"normalise": False}}, 2),
    ],
)
def test_the_loss_without_first_experts_is_that_of_the_next_best(settings, k):
    """A layer is replaced by a function that chooses among the experts behind the first one."""
    model = made(**settings)
    report = sd.examine(model, passes(model), k=k)

    def loss() -> float:
        with torch.no_grad(), sd.top_k(model, k):
            return F.cross_entropy(
                *(
                    torch.cat(parts)
                    for parts in zip(*[(y.flatten(0, 1), t.flatten()) for y, t in (run() for run in passes(model))], strict=True)
                )
            ).item()

    whole = loss()
    assert report.by_k[0].loss == pytest.approx(whole)
    for place, (_, layer) in enumerate(sd.moe_layers(model)):

        def forward(x: Tensor, layer=layer) -> Tensor:
            x_ND, S = x.flatten(0, -2), layer.config.shared_experts
            logits_NE = layer.router.logits(x_ND)
            order_NE = torch.cat([torch.arange(S).expand(len(x_ND), -1), logits_NE[:, S:].argsort(1, descending=True) + S], 1)
            kept_NK = torch.cat([order_NE[:, :S], order_NE[:, S + 1 : k + 1]], 1)
            top_NK = logits_NE.gather(1, kept_NK)
            weigh = {
                "uniform": lambda: torch.full_like(top_NK, 1 / top_NK.shape[1]),
                "sigmoid": top_NK.sigmoid,
                "unit": lambda: torch.ones_like(top_NK),
            }
            own = settings.get("gate_weight")
            weights_NK = logits_NE.softmax(1).gather(1, kept_NK) if "options" in settings else weigh.get(own, lambda: top_NK.softmax(1))()
            return layer.experts(x_ND, kept_NK, weights_NK).view_as(x)

        own, layer.forward = layer.forward, forward
        assert report.layers[place].loss_without_first == pytest.approx(loss() - whole, abs=1e-6)
        layer.forward = own


def test_planted_faults_are_found():
    model = made()
    layers = [layer for _, layer in sd.moe_layers(model)]
    with torch.no_grad():
        layers[0].router.bias[3] = -99
        for stacked in layers[1].experts.parameters():
            stacked[5], stacked[0] = stacked[2], stacked[2]
        layers[2].router.bias[1:3] = 99
    found = sd.examine(model, passes(model), without=False)
    assert found.layers[0].dead == [3] and not found.layers[0].collapsed and found.layers[0].equal == []
    assert found.layers[1].equal == [(0, 2, 5)] and found.layers[1].cka[2][5] == pytest.approx(1)
    assert found.layers[2].collapsed and found.layers[2].dead == [0, 3, 4, 5] and found.layers[2].in_use == pytest.approx(2)
    said = "\n".join(found.findings)
    assert all(part in said for part in ("ffns.0: expert 3 of 6 is dead", "experts 0, 2, 5 compute the same", "ffns.2: the router has"))
    whole = made(seed=2)
    assert said in str(found) and sd.examine(whole, passes(whole), k=3, without=False).findings == []


@pytest.mark.parametrize(
    ("before", "final", "changed", "kept"),
    [
        ([[0, 1], [2, 3]], [[0, 1], [2, 3]], 0, 1),
        ([[0, 1], [2, 3]], [[1, 0], [2, 4]], 0.5, 0.75),
        ([[0, 1, 2], [2, 3, -1]], [[0, -1, -1], [5, 2, 3]], 0.5, (1 + 2 / 3) / 2),
        ([[-1, 4], [1, 0]], [[4, -1], [-1, -1]], 0.5, 1),
    ],
)
def test_changes_between_checkpoints_by_hand(before, final, changed, kept):
    one, other = torch.tensor(before), torch.tensor(final)
    assert fluctuation(one, other) == changed and saturation(one, other) == pytest.approx(kept)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [4, 0, 0, 0], [3, 1, 0, 0], [7, 5, 3, 1], [5]])
def test_load_entropy(counts):
    shares = np.array(counts) / sum(counts)
    expected = -sum(p * math.log(p) for p in shares if p) / math.log(len(counts)) if len(counts) > 1 else 1
    assert measures.load_entropy(torch.tensor(shares)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [*SPARSE, *(f"router {name}" for name in ROUTERS if name != "none")])
def test_every_method_and_router_is_examined_and_left_as_it_was(name):
    router = name.removeprefix("router ")
    model = build("smoe", gate_name=router)[0] if router != name else build(name)[0]
    tokens, targets = text(1)
    model.train()
    before, drawn = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    report = sd.examine(model, [lambda: (model(tokens, targets)[2], targets)], k=2, ks=(4,))
    assert model.training and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(sum(layer.load) == pytest.approx(1) and math.isfinite(layer.loss_without_first) for layer in report.layers)
    assert report.tokens == tokens.numel() and [one.k for one in report.by_k] == [2, 4]
    assert report.routes[0].shape[0] == tokens.numel() and "route" not in vars(sd.moe_layers(model)[0][1])


def test_an_adopted_model_is_examined_without_a_loss():
    model = sd.adopt(test_native.made("deepseek_v3"))
    report = sd.examine(model, [lambda: model(test_native.TOKENS)], k=2)
    assert report.tokens == test_native.TOKENS.numel() and report.by_k[0].loss is None
    assert all(layer.loss_without_first is None and 0 < layer.confidence < 1 and layer.effective_rank > 1 for layer in report.layers)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"passes": []}, "no position of the passes counts in ffns.0"),
        ({"passes": 3}, "passes is a int"),
        ({"passes": [(lambda: None, torch.ones(3))]}, "the mask of a pass is a torch.float32"),
        ({"k": 9}, "k = 9"),
        ({"ks": [0]}, "k = 0"),
        ({"sample": 2}, "sample = 2"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, said):
    model = made()
    with pytest.raises(sd.ConfigError, match=said):
        sd.examine(model, **{"passes": passes(model), **arguments})
    with pytest.raises(sd.ConfigError, match="the mask has 3 positions"):
        sd.examine(model, passes(model, [torch.ones(3, dtype=torch.bool)] * 4))
    with pytest.raises(sd.ConfigError, match="for targets"):
        sd.examine(model, [lambda: (model(TEXTS[0]), TEXTS[1])])
    assert "route" not in vars(sd.moe_layers(model)[0][1])
