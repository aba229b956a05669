"""Common mistakes with the library raise immediately instead of computing something wrong."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.conversion import ConversionWarning
from smoe_dropout.hosts import find_sites
from smoe_dropout.registry import ROUTERS
from smoe_dropout.routers import Router, Routing

D, F, E, K = 8, 16, 4, 2


def ffn() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))


def model(*networks: nn.Module) -> nn.Module:
    return nn.Sequential(*(nn.ModuleDict({"ffn": network}) for network in networks or (ffn(),)))


def config(**changes) -> sd.SMoEConfig:
    return sd.SMoEConfig(**{"num_experts": E, "top_k": K, **changes})


class Adapted(nn.Linear):
    """A linear map with an added term, as in adapters."""

    def forward(self, x):
        return super().forward(x) + x.sum()


class Itself(nn.Linear):
    """A subclass that computes the same."""


def test_linear_subclass_with_its_own_forward_is_not_a_linear_map():
    with pytest.raises(sd.ConfigError, match="finds a feed-forward network in"):
        sd.moefy(model(nn.Sequential(Adapted(D, F), nn.ReLU(), Adapted(F, D))), config())
    assert len(sd.moe_layers(sd.moefy(model(nn.Sequential(Itself(D, F), nn.ReLU(), Itself(F, D))), config()))) == 1


def test_tied_weights_are_not_untied():
    one, other = ffn(), ffn()
    other[0].weight = one[0].weight
    tied = model(one, other)
    with pytest.raises(sd.ConfigError, match=r"0\.ffn\.0\.weight and 1\.ffn\.0\.weight are the same parameter"):
        sd.moefy(tied, config())
    assert not sd.moe_layers(tied)
    outside = nn.ModuleDict({"ffn": ffn(), "embedding": nn.Embedding(F, D)})
    outside["embedding"].weight = outside["ffn"][0].weight
    with pytest.raises(sd.ConfigError, match="are the same parameter"):
        sd.moefy(outside, config())
    sd.moefy(model(one, ffn()), config())  # ties outside the model do not matter


@pytest.mark.parametrize("method", ["smoe", "smoe_dropout", "elastic", "dense", "sandwich", "dropblock"])
def test_method_without_its_own_layer_is_rejected(method):
    from smoe_dropout.registry import METHODS

    if method not in METHODS:
        pytest.skip(f"{method} is not here")
    with pytest.raises(sd.ConfigError, match=f"method = '{method}' has no layer of its own"):
        sd.moefy(model(), config(method=method, router="learned"))


class Given(Router):
    """A router that returns a given result."""

    result = None

    def __init__(self, d_model, config):
        super().__init__(config)

    def forward(self, x_ND, k):
        return type(self).result


def routing(indices=((0, 1), (2, 3)), weights=None, losses=None) -> Routing:
    chosen = torch.tensor(indices)
    return Routing(chosen, torch.ones(chosen.shape) if weights is None else weights, losses or {})


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ((torch.zeros(2, 2), torch.zeros(2, 2), {}), TypeError, "returned a tuple, not a Routing"),
        (routing(((0,), (1,))), ValueError, "every token needs 2 experts"),
        (routing(((0, 1), (2, 4))), ValueError, "chose expert 4, but experts are numbered 0 to 3"),
        (routing(((0, 1), (2, 2))), ValueError, "the same expert twice"),
        (routing(((0, 1),)), ValueError, r"both must be \[2 tokens, k = 2\]"),
        (routing(weights=torch.ones(2, 1)), ValueError, "both must be"),
        (routing(((0.0, 1.0), (2.0, 3.0))), ValueError, "the indices int64"),
        (routing(losses={"mine": torch.ones(3)}), ValueError, "loss 'mine' must be a scalar"),
    ],
)
def test_router_output_is_validated_on_the_first_pass(result, error, message, monkeypatch):
    monkeypatch.setitem(ROUTERS, "given", f"{__name__}:Given")
    monkeypatch.setattr(Given, "result", result)
    made = sd.moefy(model(), config(router="given"))
    with pytest.raises(error, match=message):
        made[0]["ffn"](torch.randn(2, D))
    monkeypatch.setattr(Given, "result", routing())
    assert made[0]["ffn"](torch.randn(2, D)).shape == (2, D)


def test_weights_with_other_router_options_are_rejected(tmp_path):
    made = sd.moefy(model(), config(router="logit_drop", options={"logit_dropout": 0.3}))
    sd.save_model(made, tmp_path / "model")
    sd.load_weights(sd.moefy(model(), config(router="logit_drop", options={"logit_dropout": 0.3})), tmp_path / "model")
    with pytest.raises(sd.ConfigError, match="has a router with"):
        sd.load_weights(sd.moefy(model(), config(router="logit_drop")), tmp_path / "model")
    with pytest.raises(sd.ConfigError, match="is not a folder"):
        sd.load_weights(made, tmp_path / "nothing")


def test_auxiliary_loss_can_always_be_added():
    made = sd.moefy(model(), config(router="learned")).train()
    loss = made[0]["ffn"](torch.randn(3, D)).sum()
    assert sd.auxiliary_loss(made) > 0 and (loss + sd.auxiliary_loss(made)).requires_grad
    loss = made.eval()[0]["ffn"](torch.randn(3, D)).sum()
    assert (loss + sd.auxiliary_loss(made)) == loss
    assert sd.auxiliary_loss(nn.ReLU()) == 0


def test_the_search_does_not_change_a_network():
    class Ponder(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(D, F), nn.Linear(F, D)

        def forward(self, x):
            return self.narrow(self.wide(x).relu())

    shared = Ponder()
    before = {name: parameter.clone() for name, parameter in shared.named_parameters()}
    assert len(find_sites(nn.ModuleList([nn.ModuleDict({"ponder": shared}), nn.ModuleDict({"ponder": shared})]))) == 1
    assert all(isinstance(shared.get_parameter(name), nn.Parameter) for name in before)
    assert all(torch.equal(shared.get_parameter(name), value) for name, value in before.items())
    with pytest.raises(sd.ConfigError, match="Ponder is itself a feed-forward network: pass moefy the model that contains it"):
        sd.moefy(shared, config())
    nn.utils.parametrizations.weight_norm(shared.wide)
    with pytest.raises(sd.ConfigError, match="remove the parametrization first"):
        sd.moefy(nn.ModuleDict({"ponder": shared}), config(sites="ponder"))


@pytest.mark.parametrize("k", [None, 2.0, True, "2"])
def test_k_must_be_a_whole_number(k):
    with pytest.raises(ValueError, match="must be a whole number"):
        sd.set_top_k(sd.moefy(model(), config()), k)


def test_numpy_integers_are_accepted_as_k():
    made = sd.moefy(model(), config())
    sd.set_top_k(made, np.int64(3))
    assert type(sd.get_top_k(made)) is int and sd.get_top_k(made) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((model, lambda: {"num_experts": 4}), "config is a dict, not an SMoEConfig"),
        ((model, lambda: None), "config is a NoneType, not an SMoEConfig: pass SMoEConfig"),
        ((lambda: None, config), "model is a NoneType, not an nn.Module"),
        ((lambda: "gpt2", config), "model is a str, not an nn.Module: load the model first"),
        ((config, model), "model is a SMoEConfig"),
        ((model, lambda: config(router="hash", balance_loss=0.1)), "balance_loss = 0.1 has no effect with router 'hash'"),
    ],
)
def test_arguments_of_moefy(arguments, message):
    with pytest.raises(sd.ConfigError, match=message):
        sd.moefy(*(argument() for argument in arguments))


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (1.5, 10), (0, 0), (True, 2)])
def test_progress_must_be_steps(step, total):
    with pytest.raises(ValueError, match="must be a whole number of at least"):
        sd.set_progress(sd.moefy(model(), config()), step, total)


@pytest.mark.parametrize("dtype", ["bf16", torch.int16])
def test_slim_takes_a_floating_point_dtype(dtype):
    with pytest.raises(ValueError, match="must be a floating-point dtype"):
        sd.slim(sd.moefy(model(), config()), 1, dtype)


def test_layer_rejects_token_ids():
    with pytest.raises(TypeError, match=r"got torch.int64: embed token ids first"):
        sd.moefy(model(), config())[0]["ffn"](torch.ones(2, D, dtype=torch.int64))


def test_trained_networks_are_not_discarded_without_a_word(tmp_path):
    """Models that transformers loaded, but not those built from a configuration, nor experts that are loaded over."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": F}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    made.save_pretrained(tmp_path / "dense")

    def loaded(kind: type = transformers.LlamaForCausalLM) -> nn.Module:
        return kind.from_pretrained(tmp_path / "dense")

    with pytest.warns(ConversionWarning, match=r"LlamaForCausalLM were replaced .*: to keep what they compute use SMoEConfig.exact\(4\)"):
        converted = sd.moefy(loaded(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        sd.moefy(loaded(), sd.SMoEConfig.exact(4))
        sd.moefy(loaded(), config(expert_init="copy"))
        sd.moefy(transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / "dense")), config())
        sd.save_pretrained(converted, tmp_path / "sparse")
        sd.from_pretrained(tmp_path / "sparse")


def test_networks_of_the_same_stack_that_stay_dense_are_warned_of():
    model = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3)])
    model[1][0].register_forward_hook(lambda *_: None)
    with pytest.warns(ConversionWarning, match=r"1 of 3 feed-forward networks of ModuleList stay dense, such as '1': .* has hooks"):
        sd.moefy(model, sd.SMoEConfig(4, 2))
    assert len(sd.moe_layers(model)) == 2
