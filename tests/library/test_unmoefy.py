"""unmoefy goes back to the dense model where that computes the same, and refuses elsewhere, leaving the model untouched."""

import copy
import pickle

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from tests.library import test_hosts
from tests.library.test_moefy import FFNS, D, F, hand_written, outputs, transformer_xl

transformers = pytest.importorskip("transformers")


class Mixer(nn.Module):
    """A feed-forward network that only `sites` selects."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return self.narrow(self.wide(x).relu())


def named() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.ModuleDict({"mixer": Mixer()}), nn.ModuleDict({"mixer": Mixer()})).eval()


def encoder(act="relu") -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, F, activation=act, batch_first=True), 2, enable_nested_tensor=True).eval()


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, F, batch_first=True), 2).eval()


def inputs(model: nn.Module) -> torch.Tensor:
    return torch.randn(3, 6, D, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)


MODELS = {
    **{name: (lambda name=name: hand_written(name), outputs) for name in FFNS},
    "transformer_xl": (transformer_xl, outputs),
    "named": (named, lambda model: model[1]["mixer"](model[0]["mixer"](inputs(model)))),
    "encoder": (encoder, lambda model: model(inputs(model))),
    "decoder": (decoder, lambda model: model(inputs(model), inputs(model))),
    **{name: (lambda name=name: test_hosts.made(name), test_hosts.logits) for name in test_hosts.HOSTS},
}


def exact(**changes) -> sd.SMoEConfig:
    return sd.SMoEConfig.exact(4, **changes)


def converted(name: str, **changes) -> nn.Module:
    return sd.moefy(MODELS[name][0](), exact(**{"sites": "*.mixer" if name == "named" else None, **changes}))


def described(model: nn.Module) -> dict:
    """The attributes of every module that make up its structure."""
    kept = {
        name: [vars(module).get(name) for name in ("training", "activation_relu_or_gelu", "use_nested_tensor")]
        for name, module in model.named_modules()
    }
    return {"repr": repr(model), "attributes": kept, "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(name, copies):
    build, run = MODELS[name]
    dense = build()
    changes = {"expert_init": "copy", "output_scale": "mean", "gate_weight": "softmax", "top_k": 2} if copies else {}
    model = copy.deepcopy(dense)
    modules = set(model.modules())
    sd.moefy(model, exact(sites="*.mixer" if name == "named" else None, **changes))
    kept = modules & set(model.modules())
    assert sd.unmoefy(model) is model and kept <= set(model.modules())
    assert described(model) == described(dense)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values(), strict=True))
    assert torch.equal(run(model), run(dense))
    assert sd.moe_layers(sd.moefy(model, exact(sites="*.mixer" if name == "named" else None)))  # as if it had never been converted


def train(model: nn.Module) -> nn.Module:
    """Random experts, with biases where the dense network had some; `up` is frozen."""
    torch.manual_seed(2)
    for _, layer in sd.moe_layers(model):
        for key, parameter in layer.experts.named_parameters():
            if key in layer.original:
                nn.init.normal_(parameter, 0.0, 0.3)
        layer.experts.up.requires_grad_(False)
    return model


@pytest.mark.parametrize("scale", ["dense", "mean"])
@pytest.mark.parametrize("how", ["split", "fresh"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_experts_become_the_dense_network(name, how, scale):
    """Also in another precision, in a pickled copy, and in training mode."""
    run = MODELS[name][1]
    model = converted(name, output_scale=scale, expert_init=how)
    model = train(model.double())
    before = run(model)
    model = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    assert torch.equal(run(model), before)
    frozen = sum(layer.experts.up.numel() for _, layer in sd.moe_layers(model))
    sd.unmoefy(model.train())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(run(model.eval()), before, rtol=1e-9, atol=1e-9)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == frozen


@pytest.mark.parametrize("host", test_hosts.HOSTS)
def test_transformers_model_becomes_an_ordinary_one(host, tmp_path):
    """Also after loading, and with two conversions; the plain class loads its folder."""
    model = test_hosts.made(host)
    for layers, router in (((0, 2), "random"), ((1,), "hash")):
        settings = {"gate_weight": "softmax"} if router == "hash" else {}
        sd.moefy(model, exact(layers=layers, router=router, **settings))
    before = test_hosts.logits(train(model))
    sd.save_pretrained(model, tmp_path / "experts")
    loaded = sd.from_pretrained(tmp_path / "experts")
    assert torch.equal(test_hosts.logits(loaded), before)
    for dense in (sd.unmoefy(loaded), sd.unmoefy(copy.deepcopy(model))):
        torch.testing.assert_close(test_hosts.logits(dense), before, rtol=1e-5, atol=1e-5)
        assert type(dense.config) is type(test_hosts.made(host).config) and not hasattr(dense.config, "smoe_dropout")
        configs = {id(m.config) for m in dense.modules() if type(getattr(m, "config", None)) is type(dense.config)}
        assert configs == {id(dense.config)}
        assert described(dense) == described(test_hosts.made(host))
        dense.save_pretrained(tmp_path / "dense")
        again = type(model).from_pretrained(tmp_path / "dense")
        assert torch.equal(test_hosts.logits(again), test_hosts.logits(dense))
        assert dense.train()(test_hosts.TOKENS, labels=test_hosts.TOKENS).loss.isfinite()


def no_bias() -> nn.Module:
    model = converted("no_bias")
    sd.moe_layers(model)[1][1].experts.bias_up.data[0, 0] = 1
    return model


def wrapped() -> nn.Module:
    model = converted("relu")
    model[0].ffn = nn.Sequential(model[0].ffn, nn.Identity())
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (hand_written, "Sequential has no MoE layers: it is dense already"),
        (lambda: converted("relu", gate_weight="softmax"), "'0.ffn' .* depend on the token .*gate_weight = 'softmax'"),
        (lambda: converted("relu", top_k=2), r"2 of its 4 experts are active.* set_top_k\(model, 4\) first"),
        (lambda: converted("relu", method="competesmoe", router="learned"), "method = 'competesmoe' routes or combines"),
        (lambda: sd.compress(converted("relu"), 2), "its experts are compressed"),
        (lambda: converted("relu", expert_init="fresh", d_expert=3), "4 experts have 4 x 3 = 12 hidden units, .* had 16"),
        (lambda: converted("relu", expert_init="copy", output_scale="mean", router="dense_to_sparse", gate_weight="softmax"), "depend"),
        (no_bias, "'1.ffn' .* its experts have biases, and the network before it had none"),
        (wrapped, "0.ffn was replaced after moefy"),
        (lambda: converted("relu")[0].ffn, "put into a module that is not part of this model"),
    ],
)
def test_refusals(build, message):
    model = build()
    modules = dict(model.named_modules())
    with pytest.raises(sd.ConfigError, match=message):
        sd.unmoefy(model)
    assert dict(model.named_modules()) == modules


def test_dense_weights_are_not_kept():
    """Only their shapes are, so that a converted model is no larger for it, and modules that the caller holds keep their weights."""
    dense = hand_written()
    ffn = dense[0].ffn
    model = sd.moefy(dense, exact())
    assert ffn[0].weight.device.type == "cpu"
    stored = [place.holder for _, layer in sd.moe_layers(model) for place in layer.original.values()]
    assert stored and all(parameter.is_meta for holder in stored for parameter in holder.parameters())
    assert sd.unmoefy(sd.moefy(hand_written().to("meta"), exact()))[0].ffn[0].weight.is_meta
