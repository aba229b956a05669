"""Reasons for modules that are left as they are."""

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.hosts import find_sites, why_not
from tests.library.architectures import ARCHITECTURES, D, F

CONFIG = {"num_experts": 4, "top_k": 2}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))


class Mixture(nn.Module):
    """A mixture of experts of no library's, with a shared expert."""

    def __init__(self, kind: str):
        super().__init__()
        self.shared = network()
        if kind == "list":
            self.score, self.parts = nn.Linear(D, 4, bias=False), nn.ModuleList(network() for _ in range(4))
        if kind == "stacked":
            self.score, self.parts = nn.Linear(D, 4), Stacked()
        if kind == "parameter":
            self.score, self.parts = nn.Parameter(torch.randn(D, 4)), nn.ModuleList(network() for _ in range(4))
        if kind == "named":
            self.score, self.experts = nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, 4)), nn.ModuleList([network(), network()])


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, D, F)), nn.Parameter(torch.randn(4, F, D))


@pytest.mark.parametrize("kind", ["list", "stacked", "parameter", "named"])
def test_mixture_of_experts_is_recognised_by_structure(kind):
    """Nothing inside it is converted, not even by name; what is outside is, by name."""
    model = nn.ModuleList([nn.ModuleDict({"ffn": network()}), nn.ModuleDict({"moe": Mixture(kind)})])
    with pytest.raises(sd.ConfigError, match=r"a mixture of experts already: use smoe_dropout.adopt\(model\) \('1.moe'"):
        sd.moefy(model, sd.SMoEConfig(**CONFIG))
    with pytest.raises(sd.ConfigError, match=r"'1.moe.shared' in '1.moe', which is a mixture of experts already"):
        sd.moefy(model, sd.SMoEConfig(**CONFIG, sites="*.shared"))
    assert why_not(model) == [("1.moe", "Mixture is a mixture of experts already: use smoe_dropout.adopt(model)")]
    assert len(sd.moe_layers(sd.moefy(model, sd.SMoEConfig(**CONFIG, sites="0.ffn")))) == 1


def test_converted_layers_are_no_mixture_of_others():
    model = sd.moefy(nn.ModuleList([nn.ModuleDict({"ffn": network()}) for _ in range(2)]), sd.SMoEConfig(**CONFIG, layers=(0,)))
    assert [site.path for site in find_sites(model)] == ["1.ffn"] and why_not(model) == []


@pytest.mark.parametrize("name", ["Llama", "OPT", "BERT"])
def test_adapters_are_named_with_the_remedy(name):
    """Those on attention do not matter."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    maps = {"Llama": ("q_proj", "up_proj"), "OPT": ("q_proj", "fc1"), "BERT": ("query", "intermediate.dense")}[name]
    free, adapted = (peft.get_peft_model(ARCHITECTURES[name].build(), peft.LoraConfig(r=2, target_modules=[part])) for part in maps)
    assert len(find_sites(free)) == 2
    with pytest.raises(sd.ConfigError, match="carries an adapter: convert the model before adding adapters, or merge them first"):
        sd.moefy(adapted, sd.SMoEConfig(**CONFIG))


def test_quantised_maps_are_named_with_the_remedy():
    model = nn.ModuleList([nn.ModuleDict({"ffn": network()})])
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(sd.ConfigError, match="before quantising it, or dequantise it first"):
        sd.moefy(quantised, sd.SMoEConfig(**CONFIG))


def test_large_models_on_the_meta_device_are_searched_without_memory():
    with torch.device("meta"):
        layers = [nn.Sequential(nn.Linear(2**14, 2**16), nn.SiLU(), nn.Linear(2**16, 2**14)) for _ in range(3)]
        model = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(2**14), "ffn": layer}) for layer in layers)
        sites = find_sites(model)
    assert [(site.path, site.activation, site.up.device.type) for site in sites] == [(f"{i}.ffn", "silu", "meta") for i in range(3)]
