"""Compressed experts W = U V + S: their outputs, pruning, and saving and loading."""

import copy
from pathlib import Path

import numpy as np
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
from utils.models.flops import active_parameters, parameter_counts

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
    pruner = Pruner(model, kept=0.25, steps=4, by="units")
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
    pruner, experts = Pruner(model, kept=0.5, steps=1, by="units"), experts_of(model)[0]
    experts.up_s.grad, experts.down_s.grad = torch.zeros_like(experts.up_s), torch.zeros_like(experts.down_s)
    experts.down_s.grad[:, 0, H // 2 :] = 1 / experts.down_s[:, 0, H // 2 :].detach()
    pruner.step()
    expected = torch.cat([torch.zeros(H // 2), torch.ones(H // 2)]) * (1 - BETA) / 2
    torch.testing.assert_close(pruner.importances[0], expected.expand(E, H))
    assert (experts.down_s[:, 0, : H // 2] == 0).all() and (experts.down_s[:, 0, H // 2 :] != 0).all()
    experts.down_s.grad[:, 0, H // 2 :] *= 3
    pruner.step()
    torch.testing.assert_close(pruner.importances[0], (expected * BETA + expected * 3).expand(E, H), msg="what was before counts on")


@pytest.mark.parametrize("by", ["rows", "units"])
def test_resumed_pruning_equals_uninterrupted_pruning(by):
    straight, resumed = (compress(model_with_experts(), 2) for _ in range(2))
    whole, first = (Pruner(model, kept=0.25, steps=6, by=by) for model in (straight, resumed))
    for model, pruner in ((straight, whole), (resumed, first)):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        pruner.step(), pruner.step()
    again = Pruner(resumed, kept=0.25, steps=6, by=by)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    whole.step(), again.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_kept_fraction_has_the_phases_of_the_authors():
    """Everything is left at step 50 of 1,000, where the schedule without phases has 0.87; in the last 200 the final fraction."""
    shares = [kept_share(step, 1000, 0.1, warm_up=50) for step in (0, 50, 51, 425, 800, 999)]
    assert shares == pytest.approx([1, 1, 0.1 + 0.9 * (1 - 1 / 750) ** 3, 0.1 + 0.9 / 8, 0.1, 0.1])
    assert kept_share(50, 1000, 0.1) == pytest.approx(0.8716, abs=1e-4)


def expected_after(step: int, maps: list[np.ndarray], means: list[np.ndarray], steps: int, kept: float, warm_up: int) -> list[np.ndarray]:
    """The maps of S with the rows zeroed that have less than the importance of the k-th least important weight, entry by entry."""
    share = 1.0 if step <= warm_up else kept + (1 - kept) * max(1 - (step - warm_up) / (steps - 5 * warm_up), 0) ** 3
    if step > steps - 4 * warm_up:
        share = kept
    of_rows = [np.repeat(mean.mean(1, keepdims=True), mean.shape[1], 1) for mean in means]
    if share == 1:
        return maps
    entries = np.sort(np.concatenate([each.ravel() for each in of_rows]))
    threshold = entries[max(int(len(entries) * (1 - share)), 1) - 1]
    return [np.where(each < threshold, 0, weights) for weights, each in zip(maps, of_rows, strict=True)]


def test_pruning_by_rows_is_that_of_the_authors():
    """One threshold over the rows of all maps, expert by expert in numpy; importances are those of the steps before."""
    model, steps, kept, draw = compress(model_with_experts(), 2), 40, 0.3, torch.Generator().manual_seed(4)
    pruner, means, latest = Pruner(model, kept, steps), [], []

    def maps(of: str) -> list[np.ndarray]:
        """Weights of every expert, as [H, D] and, the second as a linear map's weight, [D, H]."""
        tensors = [getattr(rows, of) if of == "grad" else rows for e in experts_of(model) for rows in (e.up_s, e.down_s)]
        arrays = [tensor.detach().numpy().astype(np.float64) for tensor in tensors]
        return [each[e, 0].T if at % 2 else each[e, 0] for at, each in enumerate(arrays) for e in range(len(each))]

    shares = []
    for step in range(steps):
        for experts in experts_of(model):
            for rows, scale in ((experts.up_s, 3.0), (experts.down_s, 1.0)):
                by_expert = torch.rand(rows.shape[:1], generator=draw)[:, None, None, None]
                rows.grad = scale * torch.randn(rows.shape, generator=draw) * by_expert
        weights = maps("data")
        means = (
            [BETA * mean + (1 - BETA) * last for mean, last in zip(means, latest, strict=True)]
            if step
            else list(map(np.zeros_like, weights))
        )
        latest = [np.abs(weight * gradient) for weight, gradient in zip(weights, maps("grad"), strict=True)]
        expected = expected_after(step, weights, means, steps, kept, warm_up=2)
        pruner.step()
        for ours, theirs in zip(maps("data"), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        shares.append(sum(map(np.count_nonzero, expected)) / sum(each.size for each in expected))
    assert shares[2] == 1 and shares[-1] == pytest.approx(kept, abs=0.02)
    by_expert = [np.count_nonzero(each) / each.size for each in maps("data")]
    assert max(by_expert) - min(by_expert) > 0.3  # experts and maps keep what they need
    before_, size = model(inputs()), parameters(model)
    pruner.finish()
    assert torch.equal(model(inputs()), before_) and parameters(model) == size
    stored = sum(rows.numel() for e in experts_of(model) for rows in (e.up_s, e.down_s))
    assert parameter_counts(model)["total"] == sum(p.numel() for p in model.parameters()) - round(stored * (1 - shares[-1]))


def test_the_state_of_another_pruner_is_refused():
    model = compress(model_with_experts(), 2)
    with pytest.raises(ConfigError, match="another pruner than by='rows': make one with 'rows' or 'units' as it was"):
        Pruner(model, 0.5, 4).load_state_dict(Pruner(model, 0.5, 4, by="units").state_dict())


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
    pruner = Pruner(compressed, kept=0.25, steps=2, by="units")
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
