"""Models whose layers have different numbers of experts: k, training, evaluation, counts and saved folders."""

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.registry import METHODS, load
from tests.harness.test_flops import counted
from tests.library.test_hosts import logits, made
from tests.library.test_moefy import outputs, transformer_xl
from utils.models.flops import active_parameters
from utils.models.registry import Shape
from utils.models.transformer_xl import forward_flops

COUNTS, H = (4, 1), 6
MIXED = {"num_experts": 4, "top_k": 3, "d_expert": H, "experts_by_layer": COUNTS, "init_std": 0.3}
SPARSE = [name for name in METHODS if load(METHODS, "method", name).sparse]


def mixed(seed: int = 0, **settings) -> nn.Module:
    model = transformer_xl()
    torch.manual_seed(seed)
    return sd.moefy(model, sd.SMoEConfig(**{**MIXED, **settings}))


def ks(model: nn.Module) -> list[int]:
    return [layer.top_k for _, layer in sd.moe_layers(model)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts_by_layer": ()}, "must be a list of whole numbers"),
        ({"experts_by_layer": (4, 0)}, "must be a list of whole numbers"),
        ({"experts_by_layer": 4}, "must be a list of whole numbers"),
        ({"experts_by_layer": (3, 2)}, "num_experts = 4 must be the largest"),
        ({"layers": (1,)}, "a number for each of the 1 layers"),
        ({"d_expert": None}, "requires d_expert"),
        ({"d_expert": None, "expert_init": "split"}, "expert_init = 'split' cannot be combined with experts_by_layer"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(sd.ConfigError, match=message):
        sd.SMoEConfig(**{**MIXED, **settings})


def test_one_number_per_layer_is_required():
    with pytest.raises(sd.ConfigError, match="for each of the 2 MoE layers"):
        mixed(experts_by_layer=(4, 2, 1))


def test_layers_have_their_own_experts_and_config_round_trips_through_json():
    model = mixed(layers=(1, 0), experts_by_layer=[4, 1], output_scale="dense")
    layers = [layer for _, layer in sd.moe_layers(model)]
    assert [(len(layer.experts.up), len(layer.router.weight), layer.output_scale) for layer in layers] == [(4, 4, 4.0), (1, 1, 1.0)]
    config = layers[1].config
    assert config.experts_by_layer == COUNTS and sd.SMoEConfig.from_json(config.to_json()) == config


def test_equal_numbers_are_equivalent_to_num_experts():
    one, other = mixed(experts_by_layer=(4, 4)), mixed(experts_by_layer=None)
    assert torch.equal(outputs(one), outputs(other)) and one.state_dict().keys() == other.state_dict().keys()


def test_layer_with_fewer_than_k_experts_activates_all():
    model = mixed()
    assert ks(model) == [3, 1] and sd.get_top_k(model) == 3
    with sd.top_k(model, 4):
        assert ks(model) == [4, 1] and sd.get_top_k(model) == 4
    assert ks(model) == [3, 1]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k} must be .* from 1 to the 4 experts of the largest layer"):
            sd.set_top_k(model, k)


def test_layers_set_to_different_k_have_no_common_k():
    model = mixed(experts_by_layer=(4, 3))
    sd.moe_layers(model)[1][1].top_k = 2
    assert list(sd.get_top_k(model).values()) == ks(model) == [3, 2]


@pytest.mark.parametrize("method", SPARSE)
def test_every_method_trains_and_runs_at_every_k(method):
    method = load(METHODS, "method", method)
    model = mixed(router=method.flags["gate_name"], method=method.name if method.layer else None).train()
    tokens = torch.arange(24).view(2, 12) * 7 % 11
    losses, _, _ = model(tokens, tokens)
    (losses.mean() + sd.auxiliary_loss(model)).backward()
    for _, layer in sd.moe_layers(model):
        assert layer.experts.up.grad.abs().amax((1, 2)).count_nonzero() >= 1
        assert torch.isfinite(layer.experts.up.grad).all()
    model.eval()
    for k in (1, 2, 3, 4):
        with sd.top_k(model, k), torch.no_grad():
            assert torch.isfinite(outputs(model)).all()
        assert [layer.load().shape[0] for _, layer in sd.moe_layers(model)] == list(COUNTS)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_flops_and_active_parameters(k):
    sizes = {"n_layer": 3, "n_head": 2, "d_model": 12, "d_head": 5, "mem_len": 7, "n_token": 13, "d_inner": 24}
    model = sd.moefy(transformer_xl(**sizes), sd.SMoEConfig(**{**MIXED, "experts_by_layer": (4, 1, 2), "backend": "reference"}))
    active = [min(k, count) for count in (4, 1, 2)]
    with sd.top_k(model, k):
        assert forward_flops(model, Shape(2, 3, 4), k) == forward_flops(model, Shape(2, 3, 4), None) == counted(model, 2, 3, 4)
    idle = sum((count - used) * (2 * H * 12 + H + 12) for count, used in zip((4, 1, 2), active, strict=True))
    assert active_parameters(model, k)[0] == sum(parameter.numel() for parameter in model.parameters()) - idle


def test_folders_are_loaded_strictly(tmp_path):
    model = mixed()
    sd.save_model(model, tmp_path)
    assert torch.equal(outputs(sd.load_weights(mixed(seed=1), tmp_path)), outputs(model))
    with pytest.raises(sd.ConfigError, match=r"experts_by_layer = \(4, 1\), but the model has None"):
        sd.load_weights(mixed(experts_by_layer=None), tmp_path)


def test_transformers_folder_round_trip(tmp_path):
    pytest.importorskip("transformers")
    model = sd.moefy(made("bert"), sd.SMoEConfig(**{**MIXED, "experts_by_layer": (1, 4, 2)}))
    sd.set_top_k(model, 2)
    sd.save_pretrained(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    assert ks(loaded) == [1, 2, 2] and torch.equal(logits(loaded), logits(model))
