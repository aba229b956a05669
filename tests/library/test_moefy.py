"""moefy replaces feed-forward networks in place: exactly where that is documented, and not at all if it raises."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.control import conversions
from smoe_dropout.layer import MoELayer
from smoe_dropout.registry import INTEGRATIONS
from utils.models.flops import parameter_counts

D, F = 8, 16
FFNS = {
    "relu": lambda: (nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D)),
    "gelu_dropout": lambda: (nn.Linear(D, F), nn.GELU(), nn.Dropout(0.3), nn.Linear(F, D)),
    "gelu_tanh": lambda: (nn.Linear(D, F), nn.GELU(approximate="tanh"), nn.Linear(F, D)),
    "silu_final_dropout": lambda: (nn.Linear(D, F), nn.SiLU(), nn.Linear(F, D), nn.Dropout(0.2)),
    "both_dropouts": lambda: (nn.Linear(D, F), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(F, D), nn.Dropout(0.2)),
    "no_bias": lambda: (nn.Linear(D, F, bias=False), nn.ReLU(), nn.Linear(F, D, bias=False)),
    "bias_down_only": lambda: (nn.Linear(D, F, bias=False), nn.GELU(), nn.Linear(F, D)),
}
EXACT = {"expert_init": "split", "gate_weight": "uniform", "output_scale": "dense", "top_k": 4}


class Block(nn.Module):
    def __init__(self, *ffn: nn.Module):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(D), nn.Sequential(*ffn)

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def hand_written(name="relu", n_layer=2) -> nn.Module:
    """Blocks with nonzero biases, in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(*FFNS[name]()) for _ in range(n_layer)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return model.eval()


def transformer_xl(**sizes) -> MemTransformerLM:
    torch.manual_seed(0)
    defaults = {"n_token": 11, "n_layer": 2, "n_head": 2, "d_model": D, "d_head": 4, "d_inner": F, "mem_len": 5, "init_std": 0.3}
    model = MemTransformerLM(TransformerXLConfig(**{**defaults, **sizes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0.0, 0.3)
    return model


def config(**settings) -> sd.SMoEConfig:
    return sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, **settings})


def experts_of(model: nn.Module) -> list:
    return [layer.experts for _, layer in sd.moe_layers(model)]


def outputs(model: nn.Module) -> torch.Tensor:
    """Outputs of the hand-written model, or of the Transformer-XL over two segments."""
    if not isinstance(model, MemTransformerLM):
        dtype = next(model.parameters()).dtype
        return model(torch.randn(3, 6, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype))
    tokens = torch.arange(24).view(2, 12) * 7 % 11
    first, memory = model.hidden(tokens[:, :6])
    return torch.cat([first, model.hidden(tokens[:, 6:], memory)[0]], 1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    """Default dtype of all modules in the test."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
BUILDERS = {**{name: (lambda name=name: hand_written(name)) for name in FFNS}, "transformer_xl": transformer_xl}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_split_equals_the_dense_model_at_k_E(build, dtype):
    dense = build()
    sparse = sd.moefy(copy.deepcopy(dense), config(**EXACT))
    torch.testing.assert_close(outputs(sparse), outputs(dense), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_split_has_the_gradients_of_the_dense_model():
    dense = hand_written("gelu_dropout", n_layer=1).double()
    sparse = sd.moefy(copy.deepcopy(dense), config(**EXACT)).double()
    for model in (dense, sparse):
        outputs(model).square().sum().backward()
    up, down = dense[0].ffn[0], dense[0].ffn[3]
    experts = sparse[0].ffn.experts
    expected = {"up": up.weight.grad, "bias_up": up.bias.grad.view(4, -1), "down": down.weight.grad.t()}
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(experts, name).grad, gradient.reshape(getattr(experts, name).shape), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(experts.bias_down.grad, down.bias.grad.expand(4, D), rtol=1e-12, atol=1e-12)  # E * 1/E of the bias


def test_split_with_output_scale_mean_is_the_dense_network_over_E(dtype):
    ffn, sparse = hand_written()[0].ffn, sd.moefy(hand_written(), config(**{**EXACT, "output_scale": "mean"}))[0].ffn
    x = torch.randn(7, D)
    torch.testing.assert_close(4 * sparse(x), ffn(x), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("gate_weight", ["softmax", "uniform"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_copy_equals_the_dense_model_at_any_k(build, gate_weight, k, dtype):
    dense = build()
    sparse = sd.moefy(copy.deepcopy(dense), config(expert_init="copy", gate_weight=gate_weight, top_k=k))
    torch.testing.assert_close(outputs(sparse), outputs(dense), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize(("d_expert", "width"), [(None, 64), (24, 24)])
def test_fresh_experts(std, d_expert, width):
    dense = transformer_xl(d_model=32, d_inner=256)
    torch.manual_seed(7)
    sparse = sd.moefy(copy.deepcopy(dense), config(init_std=std, d_expert=d_expert))
    for experts, (_, layer) in zip(experts_of(sparse), sd.moe_layers(sparse), strict=True):
        assert experts.up.shape == experts.down.shape == (4, width, 32)
        for weight in (experts.up, experts.down, layer.router.weight):
            assert weight.std().item() == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5)
            assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5
        assert not (experts.bias_up.any() or experts.bias_down.any() or layer.router.bias.any())
    assert len({round(weight.sum().item(), 5) for experts in experts_of(sparse) for weight in (*experts.up, *experts.down)}) == 16
    torch.manual_seed(7)
    again = sd.moefy(copy.deepcopy(dense), config(init_std=std, d_expert=d_expert))
    assert all(torch.equal(a, b) for a, b in zip(sparse.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("layers", [None, (0,), (1,), (2, 0), (-1,), range(-3, -1)])
def test_layers_selects_networks(layers):
    model = transformer_xl(n_layer=3)
    before = [layer.feed_forward.core for layer in model.layers]
    assert sd.moefy(model, config(layers=layers)) is model
    for index, layer in enumerate(model.layers):
        chosen = layers is None or index in layers or index - 3 in layers
        assert isinstance(layer.feed_forward.core, MoELayer) if chosen else layer.feed_forward.core is before[index]
    assert model.head.weight is model.embedding.weight
    assert outputs(model).isfinite().all()


def uneven() -> nn.Module:
    model = hand_written()
    model[1].ffn = nn.Sequential(nn.Linear(D, 15), nn.ReLU(), nn.Linear(15, D))
    return model


def without(*ffn: nn.Module) -> nn.Module:
    return nn.Sequential(Block(*ffn))


@pytest.mark.parametrize(
    ("build", "settings", "words"),
    [
        (hand_written, {"layers": (0, 2)}, r"layers names \[2\], but Sequential has layers 0 to 1"),
        (transformer_xl, {"num_experts": 5}, "width 16 of 'layers.0.feed_forward.core' is not divisible by num_experts = 5"),
        (uneven, {}, "width 15 of '1.ffn' is not divisible"),
        (uneven, {"expert_init": "split"}, "width 15 of '1.ffn' is not divisible"),
        (hand_written, {"layers": (-3,)}, r"layers names \[-3\], but"),
        (hand_written, {"layers": (1, -1)}, r"layers = \(1, -1\) names layer 1 of 2 twice"),
        (lambda: sd.moefy(hand_written(), config(layers=(0,))), {}, r"layers 0 of Sequential are MoE .* such as layers = \(1,\)"),
        (lambda: sd.moefy(hand_written(), config(layers=(0,))), {"layers": (0, 1)}, r"layers names \[0\], which are MoE layers already"),
        (lambda: sd.moefy(hand_written(), config(layers=(0,))), {"layers": (1,), "num_experts": 3}, "width 16 .* not divisible"),
        (lambda: sd.moefy(hand_written(), config(layers=(0,))), {"layers": (2,)}, "layers 0 to 1"),
        (lambda: sd.moefy(hand_written(), config(layers=(0,))), {"layers": (1,), "sites": "0.ffn"}, "all 1 feed-forward networks"),
        (lambda: sd.moefy(hand_written(), config()), {"layers": (1,)}, "all 2 feed-forward networks of Sequential are MoE layers already"),
        (
            lambda: sd.moefy(hand_written(), config(layers=(0,))),
            {"layers": (1,), "method": "momentumsmoe"},
            "must be converted at once",
        ),
        (lambda: nn.Linear(D, D), {}, "finds a feed-forward network in Linear"),
        (lambda: without(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D + 1)), {}, "finds a feed-forward network"),
        (lambda: without(nn.Linear(D, F), nn.Softmax(-1), nn.Linear(F, D)), {}, "hidden units are mixed"),
        (lambda: without(nn.Linear(D, F), nn.Tanhshrink(), nn.Linear(F, D)), {}, "next to it, is none that experts support"),
        (lambda: without(nn.Linear(D, F), nn.LayerNorm(F), nn.ReLU(), nn.Linear(F, D)), {}, "the norm '1' \\(LayerNorm\\) lies between"),
        (lambda: without(nn.Linear(D, F), nn.PReLU(), nn.Linear(F, D)), {}, "the parametrised '1' \\(PReLU\\)"),
        (lambda: without(nn.Linear(D, F), nn.Dropout(0.1), nn.ReLU(), nn.Linear(F, D)), {}, "finds a feed-forward network"),
        (
            lambda: without(nn.Linear(D, F), nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.1), nn.Linear(F, D)),
            {},
            "finds a feed-forward network",
        ),
    ],
)
def test_rejected_models_are_unchanged(build, settings, words):
    model = build()
    modules, state = dict(model.named_modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(sd.ConfigError, match=words):
        sd.moefy(model, config(**settings))
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_failure_at_the_end_leaves_the_model_untouched(monkeypatch):
    """Also the second conversion, in a library's integration or in a host, after layers and hooks are in place."""
    model = sd.moefy(transformer_xl(n_layer=3), config(layers=(0,), router="learned"))
    before = outputs(model)

    def state() -> dict:
        """Attributes of every module, except those of the last pass."""
        found = {id(module): {**vars(module), "assigned": 0, "losses": 0, "last_pass": 0} for module in model.modules()}
        return {key: {name: list(value) if isinstance(value, dict) else value for name, value in its.items()} for key, its in found.items()}

    seen = state()
    monkeypatch.setitem(INTEGRATIONS, "torch", f"{__name__}:Failing")
    with pytest.raises(RuntimeError, match="integration failed"):
        sd.moefy(model, config(layers=(1, 2), router="hash"))
    assert state() == seen
    assert torch.equal(outputs(model), before)


class Failing:
    @staticmethod
    def integrate(model, config):
        raise RuntimeError("the integration failed")


@pytest.mark.parametrize("build", [hand_written, lambda n_layer: hand_written("both_dropouts", n_layer), transformer_xl])
@pytest.mark.parametrize("sites", [None, "*.[cf][fo]*[en]"])
def test_second_conversion_of_other_layers(build, sites, tmp_path):
    """Indices count the original networks, so that replaying the configurations makes the same model, and saved weights load."""
    second = {"layers": (-3,), "num_experts": 8, "top_k": 1, "router": "learned", "expert_init": "split"}
    steps = [config(layers=(2, 0), sites=sites), config(**second, sites=sites)]
    recorded = [steps[0], replace(steps[1], layers=(1,))]  # counted from 0
    model = build(n_layer=4)
    for step in steps:
        sd.moefy(model, step)
    layers = [layer for _, layer in sd.moe_layers(model)]
    assert [layer.num_experts for layer in layers] == [4, 8, 4] and conversions(model) == recorded
    assert list(sd.get_top_k(model).values()) == [layer.top_k for layer in layers]
    sd.set_top_k(model, 6)
    assert [layer.top_k for layer in layers] == [4, 6, 4] and sd.get_top_k(model) == 6
    with sd.top_k(model, 2):
        assert [layer.top_k for layer in layers] == [2, 2, 2]
    with pytest.raises(ValueError, match="k = 9 must be a whole number from 1 to the 8 experts of the largest layer"):
        sd.set_top_k(model, 9)
    sd.save_model(model, tmp_path / "model")
    again = build(n_layer=4)
    for step in steps:
        sd.moefy(again, step)
    sd.set_top_k(again, 6)
    assert torch.equal(outputs(sd.load_weights(again, tmp_path / "model")), outputs(model))
    slimmed = sd.slim(model, 2)
    assert outputs(slimmed).isfinite().all() and conversions(slimmed) == [replace(step, top_k=2) for step in recorded]
    with pytest.raises(sd.ConfigError, match="describes a model converted in 2 steps, but this one was in 1"):
        sd.load_weights(sd.moefy(build(n_layer=4), steps[0]), tmp_path / "model")
    for operation in (lambda: sd.operate(model, "drop", 2, None), lambda: sd.compress(model, 2)):
        with pytest.raises(sd.ConfigError, match="was converted in 2 steps, but this needs one configuration"):
            operation()


def test_any_width_works_if_it_is_not_divided():
    assert experts_of(sd.moefy(uneven(), config(d_expert=3)))[1].up.shape == (4, 3, D)
    assert experts_of(sd.moefy(uneven(), config(expert_init="copy")))[1].up.shape == (4, 15, D)


@pytest.mark.parametrize(
    ("name", "inner", "final"),
    [("relu", 0, None), ("gelu_dropout", 0.3, None), ("silu_final_dropout", 0, 0.2), ("both_dropouts", 0.3, 0.2)],
)
def test_dropouts_move_into_the_experts_or_stay_after_them(name, inner, final):
    model = hand_written(name)
    last = model[0].ffn[-1]
    sd.moefy(model, config())
    assert [experts.dropout for experts in experts_of(model)] == [inner, inner]
    if final is None:
        assert isinstance(model[0].ffn, MoELayer)
    else:
        assert isinstance(model[0].ffn[0], MoELayer) and model[0].ffn[1] is last and last.p == final
        model.train()
        torch.manual_seed(0)
        assert (model[0].ffn(torch.ones(200, D)) == 0).float().mean() == pytest.approx(final, abs=0.06)


@pytest.mark.parametrize("name", FFNS)
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(training, name):
    model = sd.moefy(hand_written(name).train(training), config())
    assert {path: module.training for path, module in model.named_modules() if module.training != training} == {}


@pytest.mark.parametrize("expert_init", ["fresh", "split", "copy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_have_the_dtype_of_the_network_they_replace(dtype, expert_init):
    model = sd.moefy(hand_written().to(dtype), config(expert_init=expert_init))
    assert {parameter.dtype for experts in experts_of(model) for parameter in experts.parameters()} == {dtype}
    assert outputs(model).dtype == dtype


def test_split_of_a_float64_model_is_exact():
    dense = hand_written().double()
    for parameter in dense.parameters():
        parameter.data.div_(3)  # not representable in float32
    sparse = sd.moefy(copy.deepcopy(dense), config(**EXACT))
    torch.testing.assert_close(outputs(sparse), outputs(dense), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("expert_init", ["fresh", "split", "copy"])
def test_experts_and_routers_are_on_the_device_of_the_model(expert_init):
    model = sd.moefy(hand_written().to("meta"), config(expert_init=expert_init))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):  # sizes only
        dense = MemTransformerLM(TransformerXLConfig(n_token=204))
        assert parameter_counts(dense) == {"total": 19_489_996, "trainable": 19_489_996, "router": 0}
        sparse = sd.moefy(dense, sd.SMoEConfig(num_experts=16, top_k=8))
    assert parameter_counts(sparse) == {"total": 19_521_804, "trainable": 19_521_804 - 16_448, "router": 16_448}
    assert sparse.layers[3].feed_forward.core.experts.up.shape == (16, 512, 256)
