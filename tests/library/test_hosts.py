"""Hosts for models of the transformers library: their feed-forward networks are found and replaced exactly."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout import hosts
from smoe_dropout.hosts import find_sites
from smoe_dropout.hosts.probe import activation_of
from smoe_dropout.registry import METHODS, load
from smoe_dropout.routers import LearnedRouter

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"vocab_size": 31, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 32, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 0}


def bert(act="gelu"):
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, hidden_act=act, max_position_embeddings=20))


def roberta(act="gelu"):
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, hidden_act=act, max_position_embeddings=24))


def gpt2(act="gelu_new"):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, activation_function=act))


def llama(act="silu"):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, hidden_act=act, max_position_embeddings=20, mlp_bias=True))


HOSTS = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": llama}
CAUSAL = ("gpt2", "llama")
TOKENS = torch.randint(3, 31, (2, 9), generator=torch.Generator().manual_seed(1))


def made(host: str, *act: str) -> nn.Module:
    """A model with nonzero weights and biases, in evaluation mode."""
    torch.manual_seed(0)
    model = HOSTS[host](*act).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("host", HOSTS)
def test_sites_in_the_order_of_the_layers(host):
    model = made(host)
    sites = find_sites(model)
    assert [(site.d_model, site.d_ff) for site in sites] == [(16, 32)] * 3
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    assert [int("".join(c for c in names[site.up.data_ptr()].split(".mlp")[0] if c.isdigit())[-1]) for site in sites] == [0, 1, 2]


@pytest.mark.parametrize(("host", "act"), [(h, a) for h in HOSTS for a in ("relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh")])
def test_split_equals_the_dense_model_with_all_experts(host, act):
    model = made(host, act)
    dense = logits(model)
    exact = sd.SMoEConfig(4, 4, expert_init="split", gate_weight="uniform", output_scale="dense")
    torch.testing.assert_close(logits(sd.moefy(model, exact)), dense, rtol=1e-5, atol=1e-5)
    with sd.top_k(model, 1):
        assert not torch.allclose(logits(model), dense, atol=1e-2)


OF_TRANSFORMERS = {  # those of ours whose names differ; None: has parameters, or is no activation
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_python": "gelu", "gelu_10": "gelu_clipped", "swish": "silu", "sqrtsoftplus": "sqrt_softplus",
    "linear": None, "prelu": None, "xielu": None,
}  # fmt: skip


@pytest.mark.parametrize("name", transformers.activations.ACT2FN)
def test_activations_of_transformers_are_recognised_by_their_values(name):
    assert activation_of(transformers.activations.ACT2FN[name]) == OF_TRANSFORMERS.get(name, name)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_copies_equal_the_dense_model_at_any_k(host, k):
    model = made(host)
    dense = logits(model)
    sd.moefy(model, sd.SMoEConfig(4, k, expert_init="copy"))
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_only_the_chosen_networks_are_replaced(host):
    """LayerNorm, residual and its dropout are the model's own; parameters outside the chosen layers are unchanged."""
    dense, model = made(host), sd.moefy(made(host), sd.SMoEConfig(4, 2, layers=(0, 2)))
    before, after = dict(dense.named_parameters()), dict(model.named_parameters())
    assert len(sd.moe_layers(model)) == 2 and any(".1." in name for name in before.keys() & after.keys())
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    gone = before.keys() - after.keys()
    assert len(gone) == (12 if host == "llama" else 8) and not [
        name for name in gone if ".1." in name or "norm" in name.lower() or "ln_" in name
    ]
    count = sum(isinstance(module, nn.Dropout) for module in dense.modules())
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == count


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("router", ["random", "learned", "hash"])
def test_training_step_moves_the_right_parameters(host, router):
    model = sd.moefy(made(host), sd.SMoEConfig(4, 2, router=router, balance_loss=0.1 if router == "learned" else None)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    loss, auxiliary = model(TOKENS, labels=TOKENS).loss, sd.auxiliary_loss(model)
    assert bool(auxiliary) == (router == "learned")
    loss.backward()  # includes the auxiliary losses
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if ".experts." in name} <= moved
    assert {name for name in before if ".router." in name and name.endswith("weight")} & moved == (
        {name for name in before if ".router.weight" in name} if router == "learned" else set()
    )


@pytest.mark.parametrize("host", CAUSAL)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_generation_works_at_any_k(k, host):
    """With its key-value cache it gives the same tokens as reading the whole text."""
    model = sd.moefy(made(host), sd.SMoEConfig(4, 2))
    with sd.top_k(model, k):
        text = model.generate(TOKENS[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
        for end in range(4, text.shape[1]):
            assert model(text[:, :end]).logits[0, -1].argmax() == text[0, end]


@pytest.mark.parametrize("host", HOSTS)
def test_round_trip_and_copy(host, tmp_path):
    model = sd.moefy(made(host), sd.SMoEConfig(4, 2))
    sd.save_model(model, tmp_path)
    torch.manual_seed(5)
    loaded = sd.load_weights(sd.moefy(HOSTS[host]().eval(), sd.SMoEConfig(4, 2)), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", METHODS)
def test_methods_on_this_host(name, host):
    """They run and train, or are rejected with the reason and leave the model unchanged."""
    method, model = load(METHODS, "method", name), made(host)
    dense = logits(model)
    if method.convert:
        method.convert(model, method.options())
        assert torch.equal(logits(model), dense)  # every kind of dropout is off in evaluation
        assert not torch.equal(model.train()(TOKENS).logits, dense)
        return
    settings = {"router": method.flags.get("gate_name", "random"), "method": name if method.layer else None}
    if method.layer and "probabilities" in method.layer.needs:
        with pytest.raises(sd.ConfigError, match="uses the implementation 'sdpa'; build the model with attn_implementation='eager'"):
            sd.moefy(model, sd.SMoEConfig(4, 2, **settings))
        assert torch.equal(logits(model), dense)
        model.set_attn_implementation("eager")
    if method.sparse:
        torch.manual_seed(2)  # a draw with which every layer has tokens for its experts, where some experts compute nothing
        sd.moefy(model, sd.SMoEConfig(4, 2, **settings))
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        routers = [layer.router.weight for _, layer in sd.moe_layers(model) if isinstance(layer.router, LearnedRouter)]
        assert all(weight.grad.any() for weight in routers) and bool(sd.auxiliary_loss(model)) == bool(routers)
        assert all(layer.experts.up.grad.isfinite().all() and layer.experts.up.grad.any() for _, layer in sd.moe_layers(model))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "name", [name for name in METHODS if (layer := load(METHODS, "method", name).layer) and "attention" in layer.needs]
)
def test_routes_see_as_far_as_the_models_attention(name, host):
    """In a causal model no route depends on a later token; in an encoder the last token changes the router scores of the first."""
    model = made(host)
    model.set_attn_implementation("eager")
    sd.moefy(model, sd.SMoEConfig(4, 2, router="learned", method=name, init_std=0.3))
    other = TOKENS.clone()
    other[:, -1] = (other[:, -1] + 5) % 31

    def weights(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model(tokens)
        return torch.stack(
            [layer.route(x).weights_NK.view(*tokens.shape, 2) for (_, layer), x in zip(sd.moe_layers(model), seen, strict=True)]
        )

    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for _, layer in sd.moe_layers(model)]
    before = weights(TOKENS)
    seen.clear()
    after = weights(other)
    same = torch.allclose(before[:, :, :-1], after[:, :, :-1], rtol=0, atol=1e-5)
    assert same == (host in CAUSAL)
    assert not torch.equal(before, after)
    if host not in CAUSAL:  # through the routing itself, not only through attention
        for hook in hooks:
            hook.remove()
        layer, x = sd.moe_layers(model)[0][1], torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(3))
        moved = x.clone()
        moved[:, -1] += 1
        layer.shared.probabilities[layer.index] = torch.full((1, 2, 9, 9), 1 / 9)
        with torch.no_grad():
            assert not torch.equal(layer.route(x).weights_NK[0], layer.route(moved).weights_NK[0])


@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(hosts.__file__).parent.glob("[a-z]*.py"))])
def test_importing_draws_no_random_numbers(name):
    """So that the first conversion of a process, which imports these modules, draws the same experts as the second."""
    before = torch.random.get_rng_state()
    runpy.run_module(f"smoe_dropout.hosts.{name}")
    assert torch.equal(before, torch.random.get_rng_state())
