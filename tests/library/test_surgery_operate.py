"""Calibration counts correctly, and models after surgery save, load and train like any model with fewer experts."""

import copy
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smoe_dropout as sd
from smoe_dropout.registry import SURGERIES
from tests import tiny
from tests.conftest import ROOT
from tests.library.test_hosts import TOKENS, logits, made
from tests.library.test_moefy import D, hand_written, outputs, transformer_xl
from utils.models.flops import active_parameters
from utils.models.registry import Shape
from utils.models.transformer_xl import forward_flops

E, H = 4, 4


def model_with_experts(host=transformer_xl, **settings) -> nn.Module:
    model = host()
    torch.manual_seed(0)
    model = sd.moefy(model, sd.SMoEConfig(**{"num_experts": E, "top_k": 2, "init_std": 0.5, **settings}))
    for _, layer in sd.moe_layers(model):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.5)
    return model.eval()


def calibrated(model: nn.Module, k: int | None = None, **settings) -> sd.Calibration:
    read = (lambda: logits(model)) if hasattr(model, "generate") else (lambda: outputs(model))
    return sd.calibrate(model, [(read, None)], k, **settings)


def with_usage(calibration: sd.Calibration, *usages: list[float]) -> sd.Calibration:
    pairs = zip(calibration.layers, usages, strict=True)
    pairs = [(layer, torch.tensor(usage).double()) for layer, usage in pairs]
    return replace(calibration, layers=tuple(layer._replace(usage_E=usage_E, saliency_E=usage_E) for layer, usage_E in pairs))


def sizes(model: nn.Module) -> list[int]:
    return [layer.num_experts for _, layer in sd.moe_layers(model)]


# calibration


@pytest.mark.parametrize("output_scale", ["mean", "dense"])
@pytest.mark.parametrize("k", [1, 3])
def test_usage_and_gate_weight_match_the_routers(k, output_scale):
    model = model_with_experts(hand_written, output_scale=output_scale).double()
    seen, routers = [], [layer.router for _, layer in sd.moe_layers(model)]
    hooks = [router.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing)) for router in routers]
    calibration = calibrated(model, k)
    [hook.remove() for hook in hooks]
    assert calibration.tokens == 18 and calibration.k == k and len(seen) == len(calibration.layers)
    for routing, layer in zip(seen, calibration.layers, strict=True):
        weight_E = torch.zeros(18, E).double().scatter(1, routing.indices_NK, routing.weights_NK.double()).sum(0)
        torch.testing.assert_close(layer.weight_E, weight_E / 18)
        assert layer.usage_E.tolist() == [(routing.indices_NK == expert).sum().item() / (18 * k) for expert in range(E)]


def test_padding_is_never_counted():
    """Neither in the usage nor in the sample, for any batching of rows."""
    model, rows = model_with_experts(hand_written), torch.randn(3, 5, D)
    lengths = torch.tensor([5, 1, 3])
    real = torch.arange(5) < lengths[:, None]
    padded = sd.calibrate(model, [(lambda: model(rows), real)])
    alone = sd.calibrate(model, [(lambda row=row, n=n: model(row[None, :n]), None) for row, n in zip(rows, lengths, strict=True)])
    assert padded.tokens == alone.tokens == 9
    for one, other in zip(padded.layers, alone.layers, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_sample_is_bounded_and_determined_by_the_seed():
    model = model_with_experts(hand_written)
    whole, some, again, other = (calibrated(model, sample=size, seed=seed).layers[0] for size, seed in ((99, 0), (7, 0), (7, 0), (7, 1)))
    assert whole.inputs_SD.shape == (18, D) and some.logits_SE.shape == (7, E)
    assert torch.equal(some.inputs_SD, again.inputs_SD) and not torch.equal(some.inputs_SD, other.inputs_SD)
    rows = {tuple(row) for row in whole.inputs_SD.tolist()}
    assert all(tuple(row) in rows for row in some.inputs_SD.tolist())
    torch.testing.assert_close(some.logits_SE, sd.moe_layers(model)[0][1].router.logits(some.inputs_SD))


def test_calibration_leaves_the_model_unchanged():
    model = model_with_experts().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        sd.calibrate(model, [(lambda: 1 / 0, None)], k=1)
    calibrated(model, k=1)
    (_, first), (_, second) = sd.moe_layers(model)
    first.eval()
    calibrated(model, k=1)
    assert model.training and not first.training and second.training, "every module has its own mode"
    assert sd.get_top_k(model) == 2 and not any(layer.experts._forward_pre_hooks for _, layer in sd.moe_layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_calibration_round_trip_is_strict(tmp_path):
    calibration = calibrated(model_with_experts())
    calibration.save(tmp_path / "file")
    loaded = sd.Calibration.load(tmp_path / "file")
    assert (loaded.names, loaded.k, loaded.tokens) == (calibration.names, calibration.k, calibration.tokens)
    tensors = zip((t for layer in loaded.layers for t in layer), (t for layer in calibration.layers for t in layer), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in tensors)
    save_file(load_file(tmp_path / "file"), tmp_path / "other")
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:-9])
    for name in ("nowhere", "other", "cut"):
        with pytest.raises(sd.ConfigError, match=f"{name} cannot be read as a calibration"):
            sd.Calibration.load(tmp_path / name)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (lambda model: [], "the calibration data has no positions to count"),
        (lambda model: [(lambda: outputs(model), torch.zeros(3, 6, dtype=torch.bool))], "the calibration data has no positions to count"),
        (lambda model: [(lambda: outputs(model), torch.ones(3, 5, dtype=torch.bool))], "the mask has 15 positions, but the model read 18"),
    ],
)
def test_calibration_without_positions_is_rejected(passes, message):
    model = model_with_experts(hand_written)
    with pytest.raises(ValueError, match=message):
        sd.calibrate(model, passes(model))


def test_layers_that_no_pass_reaches_are_rejected():
    model = model_with_experts()
    with pytest.raises(sd.ConfigError, match=r"no position of the calibration data reached .*: the passes must run every MoE layer"):
        sd.calibrate(model, [(lambda: sd.moe_layers(model)[0][1](torch.randn(6, D)), None)])


# the smaller model


KEPT = [([0.4, 0.1, 0.3, 0.2], [0, 2]), ([0.1, 0.1, 0.3, 0.5], [2, 3])]


@pytest.mark.parametrize("method", ["keep_best", "drop", "reap"])
@pytest.mark.parametrize("settings", [{}, {"output_scale": "dense"}, {"gate_weight": "uniform"}], ids=str)
def test_kept_experts_equal_the_model_with_the_others_never_chosen(settings, method):
    model = model_with_experts(**settings)
    calibration = with_usage(calibrated(model), *(usage for usage, _ in KEPT))
    smaller, _ = sd.operate(model, method, 2, calibration)
    for (_, layer), (_, old), (_, kept) in zip(sd.moe_layers(smaller), sd.moe_layers(model), KEPT, strict=True):
        assert torch.equal(layer.experts.up, old.experts.up[kept]) and torch.equal(layer.router.weight, old.router.weight[kept])
        with torch.no_grad():
            old.router.bias[[expert for expert in range(E) if expert not in kept]] = -math.inf
    for k in (1, 2):
        with sd.top_k(model, k), sd.top_k(smaller, k):
            torch.testing.assert_close(outputs(smaller), outputs(model), rtol=1e-5, atol=1e-5)


def test_keep_best_ranks_by_score_and_needs_no_calibration_for_router_norm():
    model = model_with_experts()
    with torch.no_grad():
        for place, (_, layer) in enumerate(sd.moe_layers(model)):
            layer.router.weight[[place, 3]] *= 10
    smaller, _ = sd.operate(model, "keep_best", 2, None, score="router_norm")
    calibration = calibrated(model)
    by_weight, _ = sd.operate(model, "keep_best", 1, calibration, score="gate_weight")
    for place, ((_, layer), (_, one), (_, old)) in enumerate(zip(*map(sd.moe_layers, (smaller, by_weight, model)), strict=True)):
        assert torch.equal(layer.experts.up, old.experts.up[[place, 3]])
        assert torch.equal(one.experts.up[0], old.experts.up[calibration.layers[place].weight_E.argmax()])


@pytest.mark.parametrize("method", SURGERIES)
def test_tensors_outside_the_moe_layers_are_unchanged(method):
    model = model_with_experts(router="learned").train()
    model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    smaller, config = sd.operate(model, method, 2, calibrated(model, k=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and sizes(model) == [E, E]
    inside = tuple(f"{name}." for name, _ in sd.moe_layers(model))
    state = smaller.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items() if not name.startswith(inside))
    assert smaller.training and [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in model.parameters()]
    assert sum(sizes(smaller)) == 4 and config.num_experts == max(sizes(smaller)) and sd.get_top_k(smaller) == min(2, config.num_experts)
    tokens = torch.arange(24).view(2, 12) * 7 % 11
    (smaller(tokens, tokens)[0].mean() + sd.auxiliary_loss(smaller)).backward()
    assert all(layer.experts.down.grad.any() for _, layer in sd.moe_layers(smaller)[1:])


@pytest.mark.parametrize("method", SURGERIES)
@pytest.mark.parametrize("settings", [{}, {"output_scale": "dense"}, {"expert_init": "split"}], ids=str)
def test_keeping_all_experts_changes_nothing(settings, method):
    model = model_with_experts(**settings)
    same, config = sd.operate(model, method, E, calibrated(model))
    assert torch.equal(outputs(same), outputs(model)) and config.num_experts == E and config.experts_by_layer is None


def test_drop_ranks_experts_of_all_layers_and_every_k_works():
    model = model_with_experts()
    calibration = with_usage(calibrated(model), [0.97, 0.01, 0.01, 0.01], [0.25] * 4)
    smaller, config = sd.operate(model, "drop", 2, calibration)
    assert sizes(smaller) == [1, 3] and config.experts_by_layer == (1, 3)
    for k in (1, 2, 3):
        with sd.top_k(smaller, k):
            assert torch.isfinite(outputs(smaller)).all()
    again, config = sd.operate(smaller, "keep_best", 1, calibrated(smaller))
    assert sizes(again) == [1, 1] and config.experts_by_layer is None


@pytest.mark.parametrize("method", SURGERIES)
def test_parameters_and_flops_decrease(method):
    model = model_with_experts()
    smaller, _ = sd.operate(model, method, 1, calibrated(model))
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, smaller)]
    assert counts[0] - counts[1] == 2 * (E - 1) * (2 * H * D + H + D + D + 1)
    largest = [sd.get_top_k(one) for one in (model, smaller)]
    assert largest == [2, 1] and active_parameters(model, 2)[0] > active_parameters(smaller, 1)[0]
    assert forward_flops(model, Shape(1, 4, 0), 1) > forward_flops(smaller, Shape(1, 4, 0), 1)  # the router is smaller too


# folders


def save_outputs(root: Path, names: list[str]) -> None:
    found = {}
    for name in names:
        model = sd.moefy(transformer_xl(), sd.SMoEConfig.from_json((root / name / "smoe_config.json").read_text()))
        found[name] = outputs(sd.load_weights(model, root / name)).detach()
    save_file(found, root / "outputs")


def test_another_process_computes_the_same(tmp_path):
    folders = {}
    for method in SURGERIES:
        model = model_with_experts(output_scale="dense", expert_init="split")
        calibration = with_usage(calibrated(model), [0.7, 0.1, 0.1, 0.1], [0.25] * 4)
        folders[method], _ = sd.operate(model, method, 2, calibration)
        sd.save_model(folders[method], tmp_path / method)
    tiny.call(save_outputs, tmp_path, list(folders))
    computed = load_file(tmp_path / "outputs")
    assert all(torch.equal(computed[method], outputs(model)) for method, model in folders.items())


@pytest.mark.parametrize("host", ["bert", "llama"])
def test_transformers_model_round_trip(host, tmp_path):
    pytest.importorskip("transformers")
    model = model_with_experts(lambda: made(host), expert_init="split", router="learned")
    calibration = sd.calibrate(model, [(lambda: model(TOKENS), None)], k=1)
    usages = [[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.25] * 4]
    smaller, config = sd.operate(model, "merge", 2, with_usage(calibration, *usages))
    assert len(set(sizes(smaller))) > 1 and model.config.smoe_dropout["num_experts"] == E
    sd.save_pretrained(smaller, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(smaller)) and sd.moe_layers(loaded)[0][1].config == config


# rejected inputs


CUT = ["random", "learned", "logit_drop", "dense_to_sparse", "noisy_top_k"]


@pytest.mark.parametrize("router", CUT)
def test_every_router_with_a_row_per_expert_is_reduced(router):
    model = model_with_experts(router=router)
    smaller, _ = sd.operate(model.train(), "keep_best", 3, calibrated(model))
    for (_, layer), (_, old) in zip(sd.moe_layers(smaller), sd.moe_layers(model), strict=True):
        rows = dict(layer.router.named_parameters())
        assert all(len(parameter) == 3 for parameter in rows.values()) and rows.keys() == dict(old.router.named_parameters()).keys()
    assert torch.isfinite(outputs(smaller)).all()


@pytest.mark.parametrize("method", ["similarity", "attention", "momentumsmoe", "competesmoe"])
def test_methods_that_route_or_combine_differently(method, tmp_path):
    model = model_with_experts(router="learned", method=method)
    smaller, config = sd.operate(model, "merge", 2, calibrated(model, k=2), by_layer=True)
    assert config.method == method and torch.isfinite(outputs(smaller)).all()
    sd.save_model(smaller, tmp_path)
    assert torch.equal(outputs(sd.load_weights(sd.moefy(transformer_xl(), config), tmp_path)), outputs(smaller))


NOTHING = [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 5}, "keep = 5 must be a whole number from 1 to the 4 experts"),
        ({"keep": 0}, "keep = 0 must be a whole number"),
        ({"keep": 1.5}, "keep = 1.5 must be a whole number"),
        ({"method": "melt"}, "unknown method of surgery 'melt'; known: merge"),
        ({"method": "merg"}, "unknown method of surgery 'merg'; nearest: merge"),
        ({"by_layers": True}, "unknown option by_layers of 'merge'; options: by_layer"),
        ({"method": "keep_best", "score": "usages"}, "unknown score 'usages'; nearest: usage"),
        ({"calibration": None}, "'merge' needs a calibration"),
        ({"method": "keep_best", "calibration": None}, "score 'usage' needs a calibration"),
        ({"usage": NOTHING, "keep": 3, "by_layer": True}, "expert 2 of MoE layer 0 would be kept, but received no tokens"),
        ({"usage": NOTHING, "keep": 3, "method": "keep_best"}, "expert 2 of MoE layer 0 would be kept, but received no tokens"),
        ({"usage": NOTHING, "keep": 3, "method": "drop"}, "expert 2 of MoE layer 0 would be kept, but received no tokens"),
        ({"usage": NOTHING, "keep": 3, "method": "reap"}, "expert 2 of MoE layer 0 would be kept, but received no tokens"),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected(arguments, message):
    model = model_with_experts()
    calibration, keep = calibrated(model), arguments.pop("keep", 2)
    if usage := arguments.pop("usage", None):
        calibration = with_usage(calibration, usage, usage)
    with pytest.raises(ValueError, match=message) as refusal:
        sd.operate(model, arguments.pop("method", "merge"), keep, **{"calibration": calibration, **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: transformer_xl(), "has no MoE layers"),
        (lambda: model_with_experts(router="hash"), "router 'hash' has no row per expert"),
        (lambda: model_with_experts(router="uniform"), "router 'uniform' has no row per expert"),
        (lambda: model_with_experts(router="none", method="thor"), "router 'none' has no row per expert"),
        (lambda: model_with_experts(num_experts=2), "the calibration belongs to another model"),
        (lambda: model_with_experts(layers=(1,)), "the calibration belongs to another model"),
        (lambda: model_with_experts(hand_written), "the calibration belongs to another model"),
    ],
)
def test_unsupported_models_are_rejected(other, message):
    with pytest.raises(sd.ConfigError, match=message):
        sd.operate(other(), "merge", 1, calibrated(model_with_experts()))


def test_documented_example():
    """The library block of docs/surgery.md runs."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "surgery.md").read_text(), re.DOTALL).group(1)
    before = "import torch, smoe_dropout as sd\nfrom torch.nn import Linear, ReLU, Sequential\n"
    before += "model = sd.moefy(Sequential(Sequential(Linear(32, 512), ReLU(), Linear(512, 32))), sd.SMoEConfig(16, 8))\n"
    before += "batches = torch.randn(3, 64, 32)\n"
    after = "\nprint(config.num_experts, sd.moe_layers(compressed)[0][1].config.expert_rank)"
    done = subprocess.run([sys.executable, "-c", before + code + after], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["8", "32"], done.stderr
