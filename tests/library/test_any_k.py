"""A k for each row, token or layer, and gate masses: every router, method and backend computes what separate runs compute."""

import pytest
import torch
from torch import Tensor, nn

import smoe_dropout as sd
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.registry import BACKENDS, METHODS, ROUTERS, load
from tests.library.test_library import Net

E, B, T = 4, 3, 5
ROWS = torch.tensor([3, 1, 4])
TOKENS = torch.tensor([[1, 4, 2, 2, 1], [3, 3, 1, 4, 4], [2, 1, 1, 3, 2]])
OF_METHODS = {name: {"method": name, "router": "none" if name == "thor" else "learned"} for name in METHODS}
OF_METHODS = {name: config for name, config in OF_METHODS.items() if load(METHODS, "method", name).layer}
CASES = {f"router {name}": {"router": name} for name in ROUTERS if name != "none"} | OF_METHODS
CASES |= {
    "uniform weights": {"router": "learned", "gate_weight": "uniform"},
    "sigmoid scores": {"router": "scored", "options": {"score": "sigmoid", "correction": True}},
    "scores in groups": {"router": "scored", "options": {"groups": 2, "top_groups": 1, "normalise": False}},
    "competition": {**OF_METHODS["competesmoe"], "options": {"flip_rate": 1.0}},
    "competition by softplus": {**OF_METHODS["competesmoe"], "options": {"flip_rate": 1.0, "affinity": "softplus"}},
    "adam": {**OF_METHODS["momentumsmoe"], "options": {"adam": True}},
    "thor by token": {**OF_METHODS["thor"], "options": {"inference": "token"}},
}


def language_model(layers: int, **settings) -> MemTransformerLM:
    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_head": 2, "d_model": 16, "d_head": 8, "d_inner": 32, "mem_len": 0, "init_std": 0.3, "dropout": 0.0}
    model = MemTransformerLM(TransformerXLConfig(40, **sizes))
    return sd.moefy(model, sd.SMoEConfig(**{"num_experts": E, "top_k": 2, "init_std": 0.3, **settings})).double()


def net(*config, **settings) -> nn.Module:
    torch.manual_seed(0)
    return sd.moefy(Net(), sd.SMoEConfig(*(config or (E, 2)), **{"init_std": 0.5, **settings}))


def ids() -> Tensor:
    return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, run, k, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of the sum of it with these weights, from the same random state in every call."""
    torch.manual_seed(3)
    with sd.top_k(model, k):
        y = run(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((y * weights[: len(y)]).sum(), trained, allow_unused=True)
    return y.detach(), [torch.zeros_like(p) if grad is None else grad for p, grad in zip(trained, found, strict=True)]


def lm(model: nn.Module) -> Tensor:
    return model(ids(), ids())[2]


@pytest.mark.filterwarnings("ignore:router 'learned' is trained:UserWarning")
@pytest.mark.parametrize(("k", "training"), [(ROWS, False), (TOKENS, True)], ids=["rows, evaluation", "tokens, training"])
@pytest.mark.parametrize("name", CASES)
def test_mixed_batch_equals_a_batch_of_each_k(name, k, training):
    """Tokens in a model of one layer, since attention mixes them. Random numbers are those of the whole batch."""
    model = language_model(1 if k.dim() == 2 else 2, **CASES[name]).train(training)
    assert_like_each_k(model, lm, k, 1e-9)


def assert_like_each_k(model: nn.Module, run, k: Tensor, tolerance: float) -> None:
    """Outputs, and gradients of all parameters, equal those of a batch for each k, of which only the tokens with this k count.

    Not so of routers whose training is of one k: those draw other numbers, or choose among other tokens, than in a batch with one k.
    """
    k_BT = k if k.dim() == 2 else k[:, None].expand(B, T)
    weights = torch.randn(run(model).shape, generator=torch.Generator().manual_seed(4)).to(next(model.parameters()).dtype)
    y, gradients = results(model, run, k, weights)
    active = [(layer.assigned >= 0).sum(1).view(B, T) for _, layer in sd.moe_layers(model)]
    layers = [layer for _, layer in sd.moe_layers(model)]
    if any(layer.training and not layer.router.ragged and type(layer.router).ragged for layer in layers):
        assert all(layer.variable or (counts >= k_BT).all() for layer, counts in zip(layers, active, strict=True)) and y.isfinite().all()
        return
    if not any(layer.variable for layer in layers):
        assert all(torch.equal(counts, k_BT) for counts in active)
        assert sd.mean_k(model).keys() and all(mean == pytest.approx(k_BT.double().mean()) for mean in sd.mean_k(model).values())
    expected, summed = torch.zeros_like(y), [torch.zeros_like(gradient) for gradient in gradients]
    for number in k.unique().tolist():
        own = (k_BT == number)[..., None]
        one, parts = results(model, run, number, weights * own)
        expected = torch.where(own, one, expected)
        summed = [total + part for total, part in zip(summed, parts, strict=True)]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for found, total in zip(gradients, summed, strict=True):
        torch.testing.assert_close(found, total, rtol=tolerance, atol=tolerance * max(1.0, total.abs().max().item()))
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("router", ["random", "learned"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_mixed_batch_by_backend(backend, router):
    model = net(backend=backend, router=router, balance_loss=0.0 if router == "learned" else None)
    layer = sd.moe_layers(model)[0][1]
    refusal = None if backend == "auto" else load(BACKENDS, "backend", backend).refusal(layer.experts.weights(torch.float32), "cpu")
    if refusal:
        pytest.skip(refusal)
    x = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(1))
    for k in (ROWS, TOKENS):
        assert_like_each_k(model, lambda model: model(x), k, 2e-6)
    with sd.top_k(model, ROWS), torch.no_grad():
        mixed = model(x)
        for row, k in enumerate(ROWS.tolist()):
            with sd.top_k(model, k):
                torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_experts_by_backend(backend, rows):
    """The first `rows` of eight tokens, or of one, have experts; outputs and gradients are those of the reference."""
    found = {}
    for name in ("reference", backend):
        layer = sd.moe_layers(net(backend=name))[0][1]
        if refusal := load(BACKENDS, "backend", name).refusal(layer.experts.weights(torch.float32), "cpu"):
            pytest.skip(refusal)
        results = []
        for count in (8, 1):
            x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            indices = torch.tensor([[2, 0]] * count).masked_fill(torch.arange(count)[:, None] >= rows, -1)
            weights = torch.full((count, 2), 0.5) * (indices >= 0)
            y = layer.experts(x, indices, weights, ragged=True)
            results += [y, *torch.autograd.grad(y.square().sum(), [x, layer.experts.up, layer.experts.down])]
            with torch.no_grad():
                results.append(layer.experts(x, indices, weights, ragged=True))
        found[name] = results
    for one, other in zip(found["reference"], found[backend], strict=True):
        torch.testing.assert_close(other, one)


WRONG = {
    "zero": (torch.tensor([0, 1, 2]), "k = 0 must be a whole number from 1 to the 4 experts"),
    "too many": (torch.tensor([1, 5, 2]), "k = 5 must be"),
    "fractions": (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), "not of whole numbers"),
    "truths": (torch.ones(B, dtype=torch.bool), "not of whole numbers"),
    "empty": (torch.zeros(0, dtype=torch.int64), "not of whole numbers"),
    "three dimensions": (torch.ones(B, T, 2, dtype=torch.int64), "rows .B. or tokens .B, T."),
    "without values": (torch.ones(B, dtype=torch.int64, device="meta"), "a torch.strided tensor on meta: give an ordinary one"),
    "sparse": (torch.ones(B, T, dtype=torch.int64).to_sparse(), "a torch.sparse_coo tensor on cpu: give an ordinary one"),
    "nested": (
        torch.nested.nested_tensor([torch.ones(n, dtype=torch.int64) for n in (1, 2)], layout=torch.jagged),
        "a nested tensor on cpu",
    ),
    "other rows": (torch.ones(B + 1, dtype=torch.int64), "an MoE layer got an input"),
    "other tokens": (torch.ones(B, T + 1, dtype=torch.int64), "an MoE layer got an input"),
    "tokens the other way": (torch.ones(T, B, dtype=torch.int64), "an MoE layer got an input"),
    "a list too short": ([1], "gives 1 numbers, but the model has 2"),
    "a wrong number in a list": ([1, 9], "k = 9 must be"),
    "an unknown layer": ({"layers.7": 1}, "layers.7"),
    "a string": ("2", "k = '2' must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_k_is_refused_and_changes_nothing(name):
    model, (k, words) = net(), WRONG[name]
    with pytest.raises(sd.ConfigError, match=words), sd.top_k(model, k):
        model(torch.randn(B, T, 8))
    assert sd.get_top_k(model) == 2


def test_k_of_a_tensor_is_that_of_the_moment():
    model, x, k = net().eval(), torch.randn(B, T, 8), ROWS.to(torch.uint8)
    with sd.top_k(model, k), sd.top_k(model, {"layers.1": 2}):
        k.fill_(1)
        model(x)
        assert sd.mean_k(model) == pytest.approx({"layers.0": 8 / 3, "layers.1": 2.0})


def test_default_by_layer_goes_there_and_back():
    model = net()
    for k, found in ([3, 3], 3), ({"layers.1": 1}, {"layers.0": 3, "layers.1": 1}), (2, 2):
        sd.set_top_k(model, k)
        assert sd.get_top_k(model) == found
        sd.set_top_k(model, sd.get_top_k(model))
        assert sd.get_top_k(model) == found
    with pytest.raises(sd.ConfigError, match="belongs to one batch"):
        sd.set_top_k(model, [1, ROWS])
    with sd.top_k(model, ROWS), pytest.raises(sd.ConfigError, match="takes one k for all tokens"):
        sd.get_top_k(model)
    with sd.top_k(model, 1):
        sd.set_top_k(model, 4)
        assert sd.get_top_k(model) == 1
    assert sd.get_top_k(model) == 4


def by_hand(logits: Tensor, p: float, smallest: int, largest: int) -> list[int]:
    found = []
    for row in logits.softmax(-1).sort(descending=True).values.tolist():
        k, mass = 0, 0.0
        while k < len(row) and mass < p:
            mass, k = mass + row[k], k + 1
        found.append(min(max(k, smallest), largest))
    return found


@pytest.mark.parametrize(
    "config", [{"router": "learned"}, {"router": "scored", "options": {"normalise": False}}], ids=["learned", "scored"]
)
def test_gate_mass_is_its_definition(config):
    model, x = net(**config, balance_loss=0.0).eval(), torch.randn(40, 8)
    layer = sd.moe_layers(model)[0][1]
    with torch.no_grad():
        layer.router.weight.mul_(3)
    before = torch.zeros(40)
    for p, smallest, largest in (0.1, 1, 4), (0.5, 1, 4), (0.8, 1, 4), (1.0, 1, 4), (0.5, 2, 3), (0.9, 3, 3):
        with sd.top_p(model, p, smallest, largest), torch.no_grad():
            model(x)
        k = (layer.assigned >= 0).sum(1)
        assert k.tolist() == [E] * 40 if p == 1 else by_hand(layer.router.logits(x), p, smallest, largest)
        assert sd.mean_k(model)["layers.0"] == pytest.approx(k.double().mean().item())
        assert (smallest, largest) != (1, 4) or (k >= before).all()
        before = k
        with sd.top_p(model, p, smallest, largest), sd.token_mask(model, torch.arange(40) < 10):
            model(x)
        assert sd.mean_k(model)["layers.0"] == pytest.approx(k[:10].double().mean().item())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0.0,), "p = 0.0"), ((1.5,), "p = 1.5"), ((float("nan"),), "p = nan"), ((0.5, 3, 2), "k_min = 3"), ((0.5, 1, 9), "k_max = 9")],
)
def test_wrong_gate_mass_is_refused(arguments, words):
    with pytest.raises(sd.ConfigError, match=words), sd.top_p(net(), *arguments):
        pass
    with pytest.raises(sd.ConfigError, match="has no logits"), sd.top_p(net(router="uniform"), 0.5):
        pass
