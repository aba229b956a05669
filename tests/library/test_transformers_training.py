"""Gradient checkpointing and torch.compile give the same gradients or raise, and compiled models never fall back silently."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import smoe_dropout as sd
from smoe_dropout.registry import METHODS, ROUTERS, load
from smoe_dropout.routers import LearnedRouter
from tests.conftest import ROOT
from tests.library.test_hosts import HOSTS, SMALL, TOKENS, made

transformers = pytest.importorskip("transformers")

LAYERS = [name for name in METHODS if (layer := load(METHODS, "method", name).layer) and "attention" not in layer.needs]
KINDS = [(None, router) for router in ROUTERS if router != "none"] + [
    (name, load(METHODS, "method", name).flags.get("gate_name", "random")) for name in LAYERS
]
BALANCED = [name for name in ROUTERS if getattr(load(ROUTERS, "router", name), "balance_by_default", 0)]


def sparse(host: str, method: str | None = None, router: str = "random", **settings) -> nn.Module:
    return sd.moefy(made(host), sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, "router": router, "method": method, **settings})).train()


def gradients(model: nn.Module, reentrant: bool | None, passes=None) -> dict[str, torch.Tensor]:
    """Gradients and counters of a copy, with dropout."""
    model = copy.deepcopy(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    sd.set_progress(model, 5, 10)
    torch.manual_seed(3)
    (passes or (lambda model: model(TOKENS, labels=TOKENS).loss.backward()))(model)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None} | dict(
        model.named_buffers()
    )


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("host", "reentrant"), [("bert", False), ("llama", True)])
@pytest.mark.parametrize(("method", "router"), KINDS)
def test_checkpointed_gradients_are_equal_or_rejected(host, method, router, reentrant):
    model = sparse(host, method, router, **({"options": {"flip_rate": 0.5}} if method == "competesmoe" else {}))
    words = None
    if reentrant and router in BALANCED:
        words = "auxiliary losses cannot be trained with reentrant"
    if method and not load(METHODS, "method", method).layer.repeatable:
        words = "cannot recompute it alone"
    if words is None:
        assert_same(gradients(model, reentrant), gradients(model, None))
    else:
        with pytest.raises(RuntimeError, match=words):
            gradients(model, reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_recomputation_keeps_the_state_of_the_pass(host, reentrant):
    """The repeated pass does not overwrite it, and several passes, each followed by its backward pass, work."""
    model = sparse(host)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for k in (2, 4, 1):
        sd.set_top_k(model, k)
        loss, layer = model(TOKENS, labels=TOKENS).loss, sd.moe_layers(model)[1][1]
        assigned = layer.assigned
        loss.backward()
        assert layer.assigned is assigned and assigned.shape[1] == k


class BiasedByLoad(LearnedRouter):
    """A router whose forward changes a buffer that it reads, as a bias that follows the load does."""

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.register_buffer("shift", torch.zeros(config.num_experts))

    def forward(self, x_ND, k):
        routing = self.choose(self.logits(x_ND) + self.shift, k)
        self.shift -= torch.bincount(routing.indices_NK.flatten(), minlength=self.num_experts) / len(x_ND)
        return routing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("host", ["bert", "llama"])
def test_buffers_change_once_under_checkpointing(host, reentrant, monkeypatch):
    """The repeated pass reads them as the original pass did, so gradients are equal, too."""
    monkeypatch.setitem(ROUTERS, "biased_by_load", f"{__name__}:BiasedByLoad")
    model = sparse(host, router="biased_by_load", balance_loss=0.0)
    plain, checkpointed = gradients(model, None), gradients(model, reentrant)
    assert any(name.endswith("router.shift") and shift.any() for name, shift in plain.items())
    assert_same(checkpointed, plain)


def under_another_k(model):
    with sd.top_k(model, 4):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()


def two_passes(model):
    (model(TOKENS, labels=TOKENS).loss + model(TOKENS.flip(0), labels=TOKENS).loss).backward()


def evaluated_between(model):
    loss = model(TOKENS, labels=TOKENS).loss
    with torch.no_grad():
        model.eval()(TOKENS.flip(0))
    model.train()
    loss.backward()


@pytest.mark.parametrize("router", ["random", "hash"])
@pytest.mark.parametrize("passes", [under_another_k, two_passes, evaluated_between])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_is_repeated_with_the_k_and_the_ids_that_it_had(passes, router, reentrant):
    model = sparse("gpt2", router=router)
    assert_same(gradients(model, reentrant, passes), gradients(model, None, passes))


def test_checkpointing_of_other_models():
    """With torch's own function; the reentrant form would lose the auxiliary losses, and raises."""
    x = torch.randn(5, 8, requires_grad=True)
    for reentrant in (False, True):
        ffn = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
        model = sd.moefy(ffn, sd.SMoEConfig(4, 2, router="learned"))
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum() + sd.auxiliary_loss(model)
        if not reentrant:
            loss.backward()
            assert model[0].router.weight.grad.any()
            continue
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()


# torch.compile


@pytest.fixture
def dynamo():
    """The compiler with an empty cache and its default limit."""
    dynamo = pytest.importorskip("torch._dynamo")
    limit = dynamo.config.recompile_limit
    dynamo.reset()
    yield dynamo
    dynamo.config.recompile_limit = limit
    dynamo.reset()


def small_bert(**settings) -> nn.Module:
    """BERT with one layer and no dropout."""
    torch.manual_seed(0)
    off = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 20}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**{**SMALL, **off}))
    return sd.moefy(model, sd.SMoEConfig(**{"num_experts": 16, "top_k": 8, "init_std": 0.3, **settings}))


def test_exactly_one_graph_per_k(dynamo):
    ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    config = sd.SMoEConfig(10, 8, d_expert=4, init_std=0.5)  # more k than torch's default limit of graphs
    model, graphs, x = sd.moefy(nn.Sequential(ffn, nn.LayerNorm(8)), config).eval(), [], torch.randn(7, 8)

    def counting(graph, _inputs):
        graphs.append(graph)
        assert "smoe_dropout.experts" in graph.code  # one operator, whatever the number of experts
        return graph.forward

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.no_grad():
        for sweep in range(2):
            for k in range(1, 11):
                with sd.top_k(model, k):
                    assert torch.equal(compiled(x), model(x))
                    assert len(graphs) == (10 if sweep else k)
    assert dynamo.config.recompile_limit >= 20


def assert_compiled_as_eager(model: nn.Module, ks, loss_of) -> None:
    """Assert equal losses and gradients, in a single graph."""
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for k in ks:
        sd.set_top_k(model, k)
        found = []
        for run in (compiled, model):
            model.zero_grad()
            loss = loss_of(run)
            loss.backward()
            found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(found[0][0], found[1][0])
        assert_same(found[0][1], found[1][1])


def test_compiled_training_of_bert(dynamo):
    """With a balance loss."""
    model = small_bert(router="learned", balance_loss=2.0).train()
    assert_compiled_as_eager(model, (3,), lambda run: run(TOKENS, labels=TOKENS).loss)
    assert sd.auxiliary_loss(model).item() > 2


@pytest.mark.parametrize("backend", ["reference", "masked", "sorted", "grouped"])
def test_compiled_training_by_backend(backend, dynamo):
    ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    model = sd.moefy(nn.Sequential(nn.LayerNorm(8), ffn), sd.SMoEConfig(4, 2, router="learned", init_std=0.5, backend=backend))
    x = torch.randn(9, 8)
    assert_compiled_as_eager(model, (1, 4), lambda run: run(x).square().sum() + sd.auxiliary_loss(model))


def test_compiled_dropout_of_experts(dynamo):
    """Dropout differs between passes, follows the seed, and is the same in the backward pass."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8))
    model = sd.moefy(nn.Sequential(ffn), sd.SMoEConfig(4, 4, init_std=0.5)).train()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(50, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        y = compiled(x)
        torch.rand(3)  # other draws in between have no effect
        y.sum().backward()
        results.append((y.detach(), model[0].experts.down.grad.clone()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    down = model[0].experts.down.detach()
    # y is linear in the second map and biases are zero, so the gradient times the map is the sum of the outputs
    assert (results[2][1] * down).sum().item() == pytest.approx(results[2][0].sum().item(), rel=1e-4)


def test_compiler_is_not_imported_without_torch_compile():
    code = "import sys, torch, smoe_dropout as sd; from torch.nn import *\n"
    code += "m = sd.moefy(Sequential(Sequential(Linear(4, 8), ReLU(), Linear(8, 4))), sd.SMoEConfig(2, 1))\n"
    code += "sd.set_top_k(m, 2); m(torch.ones(1, 4)); "
    code += "print('torch._dynamo' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False False\n"
