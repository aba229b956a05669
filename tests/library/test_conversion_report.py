"""sd.report says what a conversion would do or has done, with numbers that agree with the model's own, and changes nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from tests.library.test_hosts import HOSTS, made
from tests.library.test_moefy import hand_written, transformer_xl
from utils.models.flops import active_parameters, parameter_counts

transformers = pytest.importorskip("transformers")
MODELS = {
    **{name: (lambda name=name: made(name)) for name in HOSTS},
    "transformer_xl": transformer_xl,
    "no_bias": lambda: hand_written("no_bias"),
}
CONFIGS = {
    "default": {},
    "learned": {"router": "learned", "balance_loss": 0.1, "layers": (-1,)},
    "exact": {"expert_init": "split", "gate_weight": "uniform", "output_scale": "dense", "top_k": 4},
    "copies": {"expert_init": "copy"},
    "hash": {"router": "hash", "d_expert": 3},
    "compete": {"method": "competesmoe", "router": "learned"},
    "compressed": {"expert_rank": 2, "sparse_share": 0.5},
    "uneven": {"experts_by_layer": (4, 2), "d_expert": 5, "layers": (0, 1)},
}


def config(name: str) -> sd.SMoEConfig:
    return sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, **CONFIGS[name]})


def without_mode(found) -> dict:
    """Everything that must be equal before and after."""
    networks = [vars(network) | {"reason": bool(network.reason)} for network in found.networks]
    return {name: value for name, value in vars(found).items() if name not in ("done", "networks")} | {"networks": networks}


# the default of every model, and every other configuration of two of them
PAIRS = [(model, name) for at, name in enumerate(CONFIGS) for model in [*MODELS][at % 3 :: 3 if at else 1]]


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_dry_run_agrees_with_the_conversion(model, name):
    build = MODELS[model]
    model = build()
    total = sum(parameter.numel() for parameter in model.parameters())
    before, random = copy.deepcopy(model), torch.get_rng_state()
    planned = sd.report(model, config(name))
    assert torch.equal(torch.get_rng_state(), random)
    assert repr(model) == repr(before) and not any(hasattr(module, "_before_moefy") for module in model.modules())
    with torch.device("meta"):
        assert without_mode(sd.report(build(), config(name))) == without_mode(planned)
    if planned.refusal:
        assert "has no token embedding" in planned.refusal
        return
    done = sd.report(sd.moefy(model, config(name)))
    assert done.done and not planned.done and without_mode(done) == without_mode(planned)
    counts = parameter_counts(model)
    assert (done.parameters_before, done.parameters_after, sum(done.trained.values())) == (total, counts["total"], counts["trainable"])
    assert sum(done.stored.values()) == counts["total"]
    idle = sum(network.parameters - network.active for network in done.networks)
    assert active_parameters(model, None)[0] == counts["total"] - idle
    names = [each for each, _ in sd.moe_layers(model)]
    assert all(each.startswith(network.name) for each, network in zip(names, done.converted, strict=True))


def test_text_of_a_dry_run_and_of_the_conversion():
    model = made("gpt2")
    chosen = sd.SMoEConfig(4, 2, layers=(0, -1))
    assert str(sd.report(model, chosen)).splitlines() == [
        "GPT2LMHeadModel: 2 of 3 feed-forward networks to be converted",
        "  transformer.h: 2 of 3",
        "    transformer.h.0, 2.mlp: 16 -> 32 -> 16, gelu_tanh: 4 experts of 8, 2 active",
        "    transformer.h.1.mlp: 16 -> 32 -> 16, gelu_tanh: stays dense, not named in layers",
        "parameters: 7,520 -> 7,752",
        "  in feed-forward networks: 3,216 -> 3,448; per token at k = 2: 2,328",
        "FLOPs of feed-forward networks per token at k = 2: 6,144 -> 4,352 (71%)",
        "experts from moefy: layers 0, 2, router random, frozen, softmax weights, output scale mean, fresh at the start",
        "trained parameters: experts 2,240 of 2,240, routers 0 of 136, other 5,376 of 5,376",
    ]
    sd.moefy(model, chosen)
    second = sd.SMoEConfig(8, 1, layers=(1,), router="learned")
    assert sd.report(model, second).towers == {"transformer.h": (3, 3)}
    sd.set_top_k(sd.moefy(model, second), 5)
    found = sd.report(model)
    assert [network.k for network in found.networks] == [4, 5, 4] and found.conversions == (
        replace(chosen, layers=(0, 2), top_k=4),
        replace(second, top_k=5),
    )
    assert found.parameters_before == 7520 and str(found).count("experts from moefy:") == 2


def test_flops_of_a_dense_network_and_of_all_its_experts():
    found = sd.report(hand_written(), sd.SMoEConfig(4, 4, router="hash"))
    assert [(network.dense_flops, network.flops) for network in found.networks] == [(2 * 2 * 8 * 16,) * 2] * 2


@pytest.mark.parametrize(
    ("settings", "sentence", "reason"),
    [
        ({"num_experts": 5}, "width 32 .* not divisible by num_experts = 5", "moefy refuses"),
        ({"layers": (3,)}, "has layers 0 to 2", "moefy refuses"),
        ({"method": "attention", "router": "learned"}, "attn_implementation='eager'", "moefy refuses"),
        ({"router": "hash", "balance_loss": 0.1}, "has no effect with router 'hash'", "moefy refuses"),
        ({"sites": "*.nothing"}, "matches no module", "not matched by sites"),
    ],
)
def test_refused_conversion_is_reported_with_its_sentence(settings, sentence, reason):
    model, chosen = made("llama"), sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, **settings})
    found = sd.report(model, chosen)
    with pytest.raises(sd.ConfigError, match=sentence) as error:
        sd.moefy(model, chosen)
    assert found.refusal == str(error.value) and found.refusal in str(found)
    assert not found.converted and {network.reason for network in found.networks} == {reason}


def test_towers_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.language = hand_written("gelu_dropout", 3), hand_written(n_layer=2)

    found = sd.report(Two(), sd.SMoEConfig(4, 2, sites="language.*.ffn"))
    assert found.towers == {"language": (2, 2), "vision": (0, 3)}
    assert "    vision.0-2.ffn: 8 -> 16 -> 8, gelu: stays dense, not matched by sites" in str(found).splitlines()


def test_networks_that_are_left_have_their_reason():
    """Before the conversion and after it."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    model = hand_written(n_layer=2)
    model.head = Head()
    model.normed = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)])
    expected = [
        "  normed.0-1 stays as it is: the norm '1' (LayerNorm) lies between its maps",
        "  head stays as it is: is not part of a stack of layers, as a head or a projector is not: name it by sites=",
    ]
    for found in (sd.report(model, sd.SMoEConfig(4, 2)), sd.report(sd.moefy(model, sd.SMoEConfig(4, 2)))):
        assert [line for line in str(found).splitlines() if "stays as it is" in line] == expected
    assert "head" not in dict(sd.report(model, sd.SMoEConfig(4, 2, sites="head")).left)


@pytest.mark.parametrize(("arguments", "message"), [((None,), "model is a NoneType"), ((nn.ReLU(), {}), "config is a dict")])
def test_arguments(arguments, message):
    with pytest.raises(sd.ConfigError, match=message):
        sd.report(*arguments)


def test_model_without_networks():
    found = sd.report(nn.Linear(2, 2))
    assert found.networks == () and str(found) == "Linear: 0 of 0 feed-forward networks converted"
