"""Compressed experts W = U V + S: their outputs, pruning, and saving and loading."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.experts import Experts
from smoe_dropout.experts.compressed import factored
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import BACKENDS
from smoe_dropout.surgery.compression import BETA, Pruner, compress, distilled, kept_share
from tests import tiny
from utils.models.flops import active_parameters

E, H, D = 3, 16, 8


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(D, E * H), nn.ReLU(), nn.Linear(E * H, D)) for _ in range(2)))


def model_with_experts(**settings) -> nn.Module:
    model = sd.moefy(dense(), sd.SMoEConfig(**{"num_experts": E, "top_k": 2, "init_std": 0.5, **settings}))
    for _, layer in sd.moe_layers(model):
        nn.init.normal_(layer.experts.bias_up), nn.init.normal_(layer.experts.bias_down)
    return model.eval()


def experts_of(model: nn.Module) -> list:
    return [layer.experts for _, layer in sd.moe_layers(model)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def inputs() -> torch.Tensor:
    return torch.randn(32, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("settings", [{}, {"expert_init": "split"}, {"expert_init": "copy"}], ids=str)
def test_unpruned_factors_compute_the_same_function(rank, settings):
    model = model_with_experts(**settings)
    compressed = compress(model, rank)
    for ours, theirs in zip(experts_of(compressed), experts_of(model), strict=True):
        for name in ("up", "down"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-5)
    torch.testing.assert_close(compressed(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [0.5, 0.1])
def test_at_full_rank_u_v_is_the_whole_map(kept):
    model = model_with_experts()
    compressed = compress(model, 8, kept)
    torch.testing.assert_close(compressed(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)


def test_below_full_rank_u_v_is_the_best_approximation_and_s_the_largest_remaining_rows():
    (whole, _), (experts, _) = experts_of(model_with_experts()), experts_of(compress(model_with_experts(), 3, kept=0.25))
    left, values, right = torch.linalg.svd(whole.down)
    nearest = left[..., :3] * values[:, None, :3] @ right[:, :3]
    rests = whole.down - nearest
    assert experts.units.shape == (E, 4)
    for expert, units in enumerate(experts.units.tolist()):
        others = [unit for unit in range(H) if unit not in units]
        torch.testing.assert_close(experts.down[expert][units], whole.down[expert][units], rtol=0, atol=1e-5)
        torch.testing.assert_close(experts.down[expert][others], nearest[expert][others], rtol=0, atol=1e-5)
    up_left, up_values, up_right = torch.linalg.svd(whole.up)
    size = rests.square().sum(2) + (whole.up - up_left[..., :3] * up_values[:, None, :3] @ up_right[:, :3]).square().sum(2)
    assert torch.equal(experts.units, size.topk(4).indices.sort(1).values)


@pytest.mark.parametrize("activation", ["relu", "silu_gated"])
def test_gated_experts_are_factored_map_by_map(activation):
    torch.manual_seed(0)
    experts = Experts(E, D, H, activation, 0.0, "reference", 0.5)
    compressed = factored(experts, 8)
    compressed.keep_units(torch.zeros(E, 1, dtype=torch.int64))
    torch.testing.assert_close(compressed.each(inputs()), experts.each(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("fused", "fastmoe")])
def test_every_backend_gives_gradients_of_all_factors(backend):
    found = []
    for name in ("reference", backend):
        model = compress(model_with_experts(), 3, kept=0.5)
        for experts in experts_of(model):
            experts.backend = name
        model(inputs()).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_kept_fraction_follows_a_cubic_schedule():
    assert [kept_share(step, 10, 0.1) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.1 + 0.9 / 8, 0.1, 0.1])
    shares = [kept_share(step, 100, 0.1) for step in range(101)]
    assert shares == sorted(shares, reverse=True)


def trained(model: nn.Module, pruner: Pruner, steps: int) -> None:
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(inputs()), inputs()).backward()
        optimizer.step()
        pruner.step()


def test_pruning_removes_whole_units_on_schedule_and_stores_the_rest():
    model = compress(model_with_experts(), 2)
    pruner = Pruner(model, kept=0.25, steps=4)
    for step in range(1, 7):
        trained(model, pruner, 1)
        for experts in experts_of(model):
            rows = experts.up_s.abs().sum((1, 3)) + experts.down_s.abs().sum((1, 3))
            assert ((rows > 0).sum(1) == round(kept_share(step, 4, 0.25) * H)).all()
    before, size = model(inputs()), parameters(model)
    pruner.finish()
    torch.testing.assert_close(model(inputs()), before)
    assert size - parameters(model) == 2 * E * 2 * (H - 4) * D
    assert [layer.config.sparse_share for _, layer in sd.moe_layers(model)] == [0.25, 0.25]


def test_importance_is_a_running_mean_of_weight_times_gradient():
    model = compress(model_with_experts(), 2)
    pruner, experts = Pruner(model, kept=0.5, steps=1), experts_of(model)[0]
    experts.up_s.grad, experts.down_s.grad = torch.zeros_like(experts.up_s), torch.zeros_like(experts.down_s)
    experts.down_s.grad[:, 0, H // 2 :] = 1 / experts.down_s[:, 0, H // 2 :].detach()
    pruner.step()
    expected = torch.cat([torch.zeros(H // 2), torch.ones(H // 2)]) * (1 - BETA) / 2
    torch.testing.assert_close(pruner.importances[0], expected.expand(E, H))
    assert (experts.down_s[:, 0, : H // 2] == 0).all() and (experts.down_s[:, 0, H // 2 :] != 0).all()
    experts.down_s.grad[:, 0, H // 2 :] *= 3
    pruner.step()
    torch.testing.assert_close(pruner.importances[0], (expected * BETA + expected * 3).expand(E, H), msg="what was before counts on")


def test_resumed_pruning_equals_uninterrupted_pruning():
    straight, resumed = (compress(model_with_experts(), 2) for _ in range(2))
    whole, first = (Pruner(model, kept=0.25, steps=6) for model in (straight, resumed))
    for model, pruner in ((straight, whole), (resumed, first)):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        pruner.step(), pruner.step()
    again = Pruner(resumed, kept=0.25, steps=6)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    whole.step(), again.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True))


def check_outputs(folder: Path) -> None:
    config = sd.SMoEConfig.from_json((folder / "model" / "smoe_config.json").read_text())
    model = sd.load_weights(sd.moefy(dense(), config), folder / "model").eval()
    assert torch.equal(model(inputs()), torch.load(folder / "outputs"))


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_another_process_loads_it_strictly_and_bit_for_bit(kept, tmp_path):
    model = compress(model_with_experts(expert_init="split"), 3, kept)
    sd.save_model(model, tmp_path / "model")
    torch.save(model(inputs()), tmp_path / "outputs")
    tiny.call(check_outputs, tmp_path)
    with pytest.raises(ConfigError, match="has expert_rank = 3, but the model has None"):
        sd.load_weights(model_with_experts(), tmp_path / "model")
    with pytest.raises(ConfigError, match="sparse_share"):
        sd.load_weights(compress(model_with_experts(), 3, 0.25), tmp_path / "model")


@pytest.mark.parametrize("kept", [1.0, 0.25])
def test_transformers_model_round_trip(kept, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = compress(sd.moefy(BertModel(BertConfig(**sizes)), sd.SMoEConfig(num_experts=2, top_k=1)).eval(), 3, kept)
    sd.save_pretrained(model, tmp_path)
    tokens = torch.randint(32, (2, 5))
    ours, theirs = (some.eval()(tokens).last_hidden_state for some in (sd.from_pretrained(tmp_path), model))
    assert torch.equal(ours, theirs)


def test_merged_and_compressed_model_trains_and_loads(tmp_path):
    """In the paper's order; the layers have different numbers of experts."""
    model = model_with_experts()
    with torch.no_grad():
        sd.moe_layers(model)[0][1].router.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    merged, _ = sd.operate(model, "merge", 2, sd.calibrate(model, [(lambda: model(inputs()), None)], k=1))
    compressed = compress(merged, 3)
    pruner = Pruner(compressed, kept=0.25, steps=2)
    trained(compressed, pruner, 3)
    pruner.finish()
    sd.save_model(compressed, tmp_path)
    config = sd.SMoEConfig.from_json((tmp_path / "smoe_config.json").read_text())
    again = sd.load_weights(sd.moefy(dense(), config), tmp_path).eval()
    assert config.experts_by_layer == (1, 3) and (config.expert_rank, config.sparse_share) == (3, 0.25)
    for k in (1, 2, 3):
        with sd.top_k(again, k), sd.top_k(compressed, k):
            assert torch.equal(again(inputs()), compressed(inputs()))
    with pytest.raises(ConfigError, match="compress last"):
        sd.operate(compressed, "keep_best", 1, None, score="router_norm")


def test_total_and_active_parameters_decrease():
    model = model_with_experts()
    sizes = [(parameters(some), active_parameters(some, 2)[0]) for some in (model, compress(model, 2, 0.25), compress(model, 1, 0.1))]
    assert sizes == sorted(sizes, reverse=True) and all(one != two for one, two in zip(*zip(*sizes, strict=True), strict=True))


def test_original_is_unchanged_and_frozen_parameters_stay_frozen():
    model = model_with_experts()
    before = copy.deepcopy(model.state_dict())
    compressed = compress(model, 2, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, parameter in compressed.named_parameters() if not parameter.requires_grad] == [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    ]


def test_distillation_adds_the_divergence_at_the_temperature():
    logits, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distilled(torch.tensor(1.5), logits, teacher), 1.5 + 0.2 * divergence)  # as MC-SMoE's code
    torch.testing.assert_close(distilled(torch.tensor(1.5), logits, teacher, squared=True), 1.5 + 0.2 * 4 * divergence)
    assert distilled(torch.tensor(1.5), logits, logits) == 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress(dense(), 2), "Sequential has no MoE layers"),
        (lambda: compress(compress(model_with_experts(), 2), 2), "the experts are already compressed"),
        (lambda: compress(model_with_experts(), 0), "rank = 0 must be from 1 to 8"),
        (lambda: compress(model_with_experts(), 9), "rank = 9 must be from 1 to 8"),
        (lambda: compress(model_with_experts(), 2, kept=0.0), "kept = 0.0 must be a number above 0"),
        (lambda: Pruner(model_with_experts(), 0.1, 5), "has no compressed experts"),
        (lambda: Pruner(compress(model_with_experts(), 2), 1.5, 5), "kept = 1.5 must be a number above 0 and at most 1"),
        (lambda: Pruner(compress(model_with_experts(), 2, 0.5), 0.6, 5), "kept = 0.6 is more than the share 0.5"),
        (lambda: Pruner(compress(model_with_experts(), 2), 0.1, 0), "steps = 0 must be a whole number of at least 1"),
        (lambda: sd.SMoEConfig(expert_rank=0), "expert_rank = 0 must be a whole number"),
        (lambda: sd.SMoEConfig(expert_rank=2, sparse_share=0), "sparse_share = 0 must be a number above 0"),
        (lambda: sd.SMoEConfig(sparse_share=0.5), "has no effect without expert_rank"),
        (lambda: sd.SMoEConfig(expert_rank=2, expert_init="split"), "expert_rank requires expert_init = 'fresh'"),
    ],
)
def test_invalid_arguments_are_rejected(make, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)
