"""Feed-forward networks selected by pattern, and those of torch's Transformer layers."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.hosts import find_sites, sites_in_blocks, why_not
from smoe_dropout.registry import HOSTS, PATTERNS

D, WIDE = 8, 16
EXACT = {"num_experts": 4, "top_k": 4, "expert_init": "split", "gate_weight": "uniform", "output_scale": "dense"}


class Plain(nn.Module):
    """A functional activation, and dropout of hidden units and output."""

    def __init__(self, act=F.relu, inner=0.3, final=0.2, bias=True):
        super().__init__()
        self.first, self.drop = nn.Linear(D, WIDE, bias=bias), nn.Dropout(inner)
        self.second, self.last = nn.Linear(WIDE, D, bias=bias), nn.Dropout(final)
        self.act = act

    def forward(self, x):
        return self.last(self.second(self.drop(self.act(self.first(x)))))


class Gated(nn.Module):
    """Maps registered in an uninformative order."""

    def __init__(self, act=F.silu):
        super().__init__()
        self.back, self.value, self.opens = nn.Linear(WIDE, D), nn.Linear(D, WIDE), nn.Linear(D, WIDE, bias=False)
        self.act = act

    def forward(self, x):
        return self.back(self.act(self.opens(x)) * self.value(x))


class Wrong(Plain):
    """A network whose forward returns `change(self, x, y)` of input and output."""

    def __init__(self, change, **parts):
        super().__init__()
        self.change = change
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.change(self, x, super().forward(x))


class Block(nn.Module):
    def __init__(self, ffn):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(D), ffn

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def stacked(make=Plain, n_layer=3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Sequential(*(Block(make()) for _ in range(n_layer))), "head": nn.Linear(D, 3)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return model.eval()


def run(model: nn.Module) -> torch.Tensor:
    return model["encoder"](torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)))


def conv1d():
    transformers = pytest.importorskip("transformers")
    return nn.Sequential(transformers.pytorch_utils.Conv1D(WIDE, D), nn.GELU(), transformers.pytorch_utils.Conv1D(D, WIDE))


NETWORKS = {
    "relu": (Plain, "relu"),
    "gelu": (lambda: Plain(F.gelu), "gelu"),
    "gelu_tanh": (lambda: Plain(lambda x: F.gelu(x, approximate="tanh")), "gelu_tanh"),
    "silu_without_bias": (lambda: Plain(lambda x: x * x.sigmoid(), bias=False), "silu"),
    "swiglu": (Gated, "silu_gated"),
    "geglu": (lambda: Gated(F.gelu), "gelu_gated"),
    "conv1d": (conv1d, "gelu"),
}


@pytest.mark.parametrize(("make", "activation"), NETWORKS.values(), ids=NETWORKS)
def test_matching_networks_are_recognised_and_replaced_exactly(make, activation):
    """For any weights, even zeros; modes, the global generator and the rest of the model are unchanged."""
    model = stacked(make)
    dense = run(model)
    model["encoder"][1].ffn.train()
    before, state = {name: module.training for name, module in model.named_modules()}, torch.get_rng_state()
    sites = find_sites(model, "encoder.*.ffn")
    assert [(site.activation, site.d_model, site.d_ff) for site in sites] == [(activation, D, WIDE)] * 3
    assert {name: module.training for name, module in model.named_modules()} == before and torch.equal(torch.get_rng_state(), state)
    sd.moefy(model.eval(), sd.SMoEConfig(**EXACT, sites="encoder.*.ffn"))
    torch.testing.assert_close(run(model), dense, rtol=1e-5, atol=1e-5)
    zeros = stacked(make)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    assert [site.activation for site in find_sites(zeros.bfloat16(), "encoder.*.ffn")] == [activation] * 3


@pytest.mark.parametrize(("inner", "final"), [(0.3, 0.2), (0.3, 0.0), (0.0, 0.2)])
def test_dropouts_of_a_matching_network(inner, final):
    model = sd.moefy(stacked(lambda: Plain(inner=inner, final=final)), sd.SMoEConfig(4, 2, sites="encoder.*.ffn"))
    assert [layer.experts.dropout for _, layer in sd.moe_layers(model)] == [inner] * 3
    assert [model["encoder"][1].ffn[1].p, len(model["encoder"][1].ffn)] == [final, 2]


class Late(nn.Module):
    """Dropout of the input or the hidden units, independent of the order of registration."""

    def __init__(self, on_input: bool):
        super().__init__()
        self.early, self.first, self.second, self.late = nn.Dropout(0.4), nn.Linear(D, WIDE), nn.Linear(WIDE, D), nn.Dropout(0.3)
        self.on_input = on_input

    def forward(self, x):
        return self.second(self.late(F.relu(self.first(self.early(x) if self.on_input else x))))


def test_dropouts_are_identified_by_call_order():
    model = sd.moefy(stacked(lambda: Late(False)), sd.SMoEConfig(4, 2, sites="encoder.*.ffn"))
    assert [layer.experts.dropout for _, layer in sd.moe_layers(model)] == [0.3] * 3
    with pytest.raises(sd.ConfigError, match="cannot be switched off"):
        sd.moefy(stacked(lambda: Late(True)), sd.SMoEConfig(4, 2, sites="encoder.*.ffn"))


@pytest.mark.parametrize("sites", ["encoder.0.ffn", None])
def test_network_in_several_places_becomes_one_layer_in_several_places(sites):
    shared = nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D))
    model = stacked(lambda: shared)
    dense = run(model)
    sd.moefy(model, sd.SMoEConfig(**EXACT, sites=sites))
    torch.testing.assert_close(run(model), dense, rtol=1e-5, atol=1e-5)
    assert len(sd.moe_layers(model)) == 1 and len({block.ffn for block in model["encoder"]}) == 1


def test_all_hosts_are_searched():
    """Two kinds of networks in one model are found in the model's order."""
    layers = [nn.TransformerEncoderLayer(D, 2, WIDE, batch_first=True), Block(nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D)))]
    model = nn.Sequential(*layers, nn.TransformerEncoderLayer(D, 2, 12, batch_first=True))
    assert [site.d_ff for site in find_sites(model)] == [WIDE, 8, 12]


HOST = """
from torch import nn
from smoe_dropout.hosts.site import Site


def find(model: nn.Module) -> list[Site]:
    named = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children() if name == "ffn"]
    return [Site(parent, name, m.first.weight, m.first.bias, m.second.weight, m.second.bias, "relu", 0.0) for parent, name, m in named]
"""


def test_new_host_is_one_file_and_one_registry_line(tmp_path, monkeypatch):
    (tmp_path / "plain_host.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    model = stacked(lambda: Plain(lambda x: x.view(-1, D, WIDE).relu().view(x.shape)))  # fails on other shapes
    with pytest.raises(sd.ConfigError, match="nothing finds a feed-forward network in ModuleDict"):
        sd.moefy(model, sd.SMoEConfig(**EXACT))
    monkeypatch.setitem(HOSTS, "plain", "plain_host")
    model = stacked()
    dense = run(model)
    torch.testing.assert_close(run(sd.moefy(model, sd.SMoEConfig(**EXACT))), dense, rtol=1e-5, atol=1e-5)
    assert len(sd.moe_layers(model)) == 3


@pytest.mark.parametrize("sites", ["encoder.*.ffn", ("encoder.0.ffn", "*.2.ffn"), ["encoder.2.ffn", "encoder.0.ffn"]], ids=str)
def test_patterns_and_layers_select_in_the_models_order(sites):
    config = sd.SMoEConfig(4, 2, sites=sites, layers=(1,))
    assert sd.SMoEConfig.from_json(config.to_json()) == config and json.loads(config.to_json())["sites"] == (
        sites if isinstance(sites, str) else list(sites)
    )
    names = [name for name, _ in sd.moe_layers(sd.moefy(stacked(), config))]
    assert names == ["encoder.1.ffn.0" if sites == "encoder.*.ffn" else "encoder.2.ffn.0"]


def test_site_patterns_override_what_is_found():
    model = nn.Sequential(Block(nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D))), Block(Plain())).eval()
    assert [name for name, _ in sd.moe_layers(sd.moefy(copy.deepcopy(model), sd.SMoEConfig(4, 2)))] == ["0.ffn", "1.ffn.0"]
    assert [name for name, _ in sd.moe_layers(sd.moefy(model, sd.SMoEConfig(4, 2, sites="1.ffn")))] == ["1.ffn.0"]
    assert len(sites_in_blocks(nn.Sequential(Block(Plain()), Block(Plain())), 4, "*.ffn")) == 2


def test_network_outside_a_stack_is_left_unless_a_pattern_or_sites_names_it(monkeypatch):
    """A head or a projector computes the same as a feed-forward network."""
    model = nn.ModuleDict({"encoder": nn.Sequential(Block(Plain())), "projector": Plain()})
    assert [site.path for site in find_sites(model)] == ["encoder.0.ffn"]
    assert why_not(model) == [("projector", "is not part of a stack of layers, as a head or a projector is not: name it by sites=")]
    assert [site.path for site in find_sites(model, "projector")] == ["projector"]
    monkeypatch.setitem(PATTERNS, "mine", {"up": "first", "down": "second"})
    assert [site.path for site in find_sites(model)] == ["encoder.0.ffn", "projector"] and why_not(model) == []


@pytest.mark.parametrize("sites", ["", (), ("a", ""), 3, ("a", 1)], ids=repr)
def test_invalid_patterns_are_rejected(sites):
    with pytest.raises(sd.ConfigError, match="must be a pattern of module names"):
        sd.SMoEConfig(4, 2, sites=sites)


SUGGESTED = r"'encoder\.\*\.ffn' \(3 modules, 8 -> 16 -> 8\)"
REFUSED = {
    "no_match": (Plain, "encoder.*.mlp", rf"sites = 'encoder\.\*\.mlp' matches no module of ModuleDict.*{SUGGESTED}"),
    "nested": (Plain, ("encoder.1.ffn", "encoder.1"), r"matches both 'encoder\.1' and 'encoder\.1\.ffn' inside it"),
    "no_maps": (Plain, "encoder.*.norm", r"'encoder\.0\.norm', a LayerNorm.*has 0 linear maps"),
    "a_map": (Plain, "head", r"'head', a Linear.*has 0 linear maps"),
    "whole_block": (Plain, "encoder.?", r"has the parameter 'norm\.weight' besides"),
    "shapes": (lambda: Wrong(lambda m, x, y: y, second=nn.Linear(WIDE, D + 1)), "encoder.*.ffn", "8 -> 16, 16 -> 9 do not compose"),
    "activation": (lambda: Plain(lambda x: x.relu() ** 3), None, "next to it, is none that experts support"),
    "raises": (lambda: Plain(lambda x: x.view(-1, 5)), "encoder.*.ffn", "it fails on an input of shape"),
    "width": (lambda: Plain(), "encoder.*.ffn", "width 16 of 'encoder.0.ffn' is not divisible by num_experts = 5"),
}


@pytest.mark.parametrize(("make", "sites", "words"), REFUSED.values(), ids=REFUSED)
def test_rejection_gives_the_reason_and_leaves_the_model_unchanged(make, sites, words):
    model = stacked(make)
    modules, modes = dict(model.named_modules()), [module.training for module in model.modules()]
    with pytest.raises(sd.ConfigError, match=words):
        sd.moefy(model, sd.SMoEConfig(5 if "num_experts" in words else 4, 2, sites=sites))
    assert dict(model.named_modules()) == modules and [module.training for module in model.modules()] == modes


def test_model_without_feed_forward_networks_is_rejected():
    with pytest.raises(sd.ConfigError, match="none of its modules has maps D -> F -> D"):
        sd.moefy(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), sd.SMoEConfig(4, 2))


# torch's Transformer layers


def torch_stack(kind: str, norm_first: bool, activation="gelu") -> nn.Module:
    torch.manual_seed(0)
    settings = {"dim_feedforward": WIDE, "dropout": 0.25, "activation": activation, "batch_first": True, "norm_first": norm_first}
    if kind == "decoder":
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, **settings), 2)
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, **settings), 2, enable_nested_tensor=not norm_first)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return model


@torch.no_grad()
def torch_outputs(model: nn.Module) -> torch.Tensor:
    """Outputs of positions that are not padding."""
    x, padding = torch.randn(3, 6, D, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    y = model(x, x, tgt_key_padding_mask=padding) if isinstance(model, nn.TransformerDecoder) else model(x, src_key_padding_mask=padding)
    return y[~padding]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()], ids=["relu", "gelu", "silu"])
def test_torch_layers(kind, norm_first, training, activation):
    """Split layers at k = E equal the dense ones, and the experts run even in evaluation, where torch has a fused kernel."""
    model = torch_stack(kind, norm_first, activation).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    dense = torch_outputs(model)
    sd.moefy(model, sd.SMoEConfig(**EXACT))
    torch.testing.assert_close(torch_outputs(model), dense, rtol=1e-5, atol=1e-5)
    assert all(layer.assigned.shape == (18, 4) for _, layer in sd.moe_layers(model))
    with sd.top_k(model, 1):
        assert not torch.allclose(torch_outputs(model), dense, atol=1e-2)
    assert {module.training for module in model.modules()} == {training}


def test_torch_layers_keep_their_dropout_and_names():
    model = sd.moefy(torch_stack("encoder", False), sd.SMoEConfig(4, 2, layers=(1,)))
    ((name, layer),) = sd.moe_layers(model)
    assert name == "layers.1.linear1" and layer.experts.dropout == 0.25
    names = {name for name in model.state_dict() if name.startswith("layers.1.lin")}
    assert names == {
        f"layers.1.linear1.{part}"
        for part in ("_extra_state", "router.weight", "router.bias", *(f"experts.{n}" for n, _ in layer.experts.named_parameters()))
    }
    assert "layers.0.linear2.weight" in model.state_dict()
    layer_type = type("Own", (nn.TransformerEncoderLayer,), {"_ff_block": lambda self, x: x})
    with pytest.raises(sd.ConfigError, match="finds a feed-forward network in TransformerEncoder"):
        sd.moefy(nn.TransformerEncoder(layer_type(D, 2, WIDE), 1, enable_nested_tensor=False), sd.SMoEConfig(4, 2))
