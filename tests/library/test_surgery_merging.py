"""Merging, UNCURL's pruning and plain averaging: which experts are combined, and the result."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.surgery import averaging, merging, uncurl
from smoe_dropout.surgery.alignment import aligned, permuted
from smoe_dropout.surgery.budgets import AVERAGING, best
from smoe_dropout.surgery.calibration import LayerCalibration
from smoe_dropout.surgery.groups import Expert, Group, expert_of

D, H, SAMPLE = 8, 16, 64
METHODS = {"merge": merging, "uncurl": uncurl, "average": averaging}


def read(usage: list[float], logits_SE: torch.Tensor | None = None) -> LayerCalibration:
    """Calibration of a layer."""
    usage_E = torch.tensor(usage, dtype=torch.float64)
    logits_SE = torch.randn(SAMPLE, len(usage)) if logits_SE is None else logits_SE
    products_EE = logits_SE.T @ logits_SE
    return LayerCalibration(usage_E, usage_E, logits_SE, inputs_SD=torch.zeros(SAMPLE, D), products_EE=products_EE)


def groups_of(method: str, calibrations: list[LayerCalibration], keep: int, **options) -> list[list[Group]]:
    """Groups by a method, passing only the options that it has."""
    module = METHODS[method]
    return module.groups([None] * len(calibrations), calibrations, keep, {n: options.get(n, d) for n, d in module.OPTIONS.items()})


def logits_in_blocks(*blocks: int) -> torch.Tensor:
    """Router logits that are similar within each block of experts and dissimilar across blocks."""
    torch.manual_seed(0)
    return torch.cat([torch.randn(SAMPLE, 1) + 0.1 * torch.randn(SAMPLE, size) for size in blocks], 1)


def members(found: list[Group]) -> list[tuple[int, ...]]:
    return sorted(group.members for group in found)


@pytest.mark.parametrize(
    ("usages", "keep", "by_layer", "expected"),
    [
        ([[0.1, 0.2, 0.3, 0.4]], 2, False, [[2, 3]]),
        ([[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.3, 0.3]], 2, False, [[0], [0, 2, 3]]),
        ([[0.97, 0.01, 0.01, 0.01], [0.25] * 4], 1, False, [[0], [0]]),
        ([[0.4, 0.3, 0.2, 0.1], [0.25] * 4], 4, False, [[0, 1, 2, 3]] * 2),
        ([[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.3, 0.3]], 2, True, [[0, 1], [2, 3]]),
    ],
    ids=["one layer", "globally", "at least one in each", "all", "by layer"],
)
def test_most_used_experts_of_all_layers_are_dominant(usages, keep, by_layer, expected):
    calibrations = [read(usage) for usage in usages]
    found = groups_of("merge", calibrations, keep, by_layer=by_layer)
    assert [sorted(group.leader for group in layer) for layer in found] == expected
    assert all(sorted(sum(members(layer), ())) == [0, 1, 2, 3] for layer in found)


def test_keeping_more_experts_than_exist_is_rejected():
    with pytest.raises(ValueError, match="keep = 3 on average over 2 layers exceeds the 4 experts of the model"):
        best([torch.tensor([1.0]), torch.tensor([0.5, 0.3, 0.2])], 3, AVERAGING)


def test_other_experts_join_the_dominant_one_with_the_most_similar_routing():
    logits = logits_in_blocks(3, 2)
    (found,) = groups_of("merge", [read([0.1, 0.4, 0.1, 0.1, 0.3], 5 * logits)], 2)
    assert found == [Group((0, 1, 2), 1, 0), Group((3, 4), 4, 0)]
    opposite = torch.cat([logits, -logits[:, :1]], 1)  # the negative of the first block's logits: dissimilar
    (found,) = groups_of("merge", [read([0.1, 0.3, 0.1, 0.1, 0.3, 0.1], opposite)], 2)
    assert members(found) == [(0, 1, 2), (3, 4, 5)]


def test_average_uses_the_groups_of_merge():
    calibrations = [read([0.1, 0.2, 0.3, 0.4]), read([0.4, 0.3, 0.2, 0.1])]
    assert groups_of("average", calibrations, 2) == groups_of("merge", calibrations, 2, align="leader")


@pytest.mark.parametrize("seed", [0, 1])
def test_uncurl_clusters_every_layer_by_logits_with_the_most_used_as_leader(seed):
    one, other = read([0.1, 0.2, 0.1, 0.5, 0.1], logits_in_blocks(3, 2)), read([0.5, 0.1, 0.2, 0.1, 0.1], logits_in_blocks(1, 4))
    found = groups_of("uncurl", [one, other], 2, seed=seed)
    assert [sorted(layer) for layer in found] == [[Group((0, 1, 2), 1), Group((3, 4), 3)], [Group((0,), 0), Group((1, 2, 3, 4), 2)]]


@pytest.mark.parametrize("method", METHODS)
def test_keeping_an_expert_without_tokens_is_rejected(method):
    usage = [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"MoE layer 1 would be .*: use more data, a larger k, or keep fewer") as refusal:
        groups_of(method, [read([0.25] * 4), read(usage, logits_in_blocks(2, 2))], 2, by_layer=True)
    assert "\n" not in str(refusal.value)
    (found,) = groups_of(method, [read(usage)], 1)
    assert found[0][:2] == ((0, 1, 2, 3), 0)  # experts without tokens get weight 0


def random_layer(activation: type[nn.Module] = nn.ReLU, experts: int = 4) -> sd.MoELayer:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Sequential(nn.Linear(D, experts * H), activation(), nn.Linear(experts * H, D)))
    ((_, layer),) = sd.moe_layers(sd.moefy(host, sd.SMoEConfig(num_experts=experts, top_k=2)))
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    return layer.requires_grad_(False)


def put(layer: sd.MoELayer, index: int, expert: Expert) -> None:
    for parameter, tensor in zip(layer.experts.parameters(), expert, strict=True):
        parameter[index] = tensor


@pytest.mark.parametrize("method", ["merge", "uncurl"])
def test_permuted_copies_of_an_expert_merge_to_that_expert(method):
    layer = random_layer()
    whole = Expert(*(tensor.clone() for tensor in expert_of(layer.experts, 0)))
    for index in range(1, 4):
        put(layer, index, permuted(whole, torch.randperm(H)))
    found = METHODS[method].combine(layer, Group((0, 1, 2, 3), 0), read([0.1, 0.2, 0.3, 0.4]))
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    plain = averaging.combine(layer, Group((0, 1, 2, 3), 0), read([0.1, 0.2, 0.3, 0.4]))
    assert (plain.up_HD - whole.up_HD).abs().max() > 0.1  # without alignment they would not


def test_merge_weighs_aligned_experts_by_usage_and_average_is_the_plain_mean():
    layer, group, usage = random_layer(), Group((0, 2, 3), 2), [0.3, 0.4, 0.1, 0.2]
    experts = [expert_of(layer.experts, index) for index in group.members]
    leader = experts[1]
    first, _, last = (aligned(expert, to=leader) for expert in experts)
    merged, averaged = merging.combine(layer, group, read(usage)), averaging.combine(layer, group, read(usage))
    for name in Expert._fields:
        parts = [getattr(expert, name) for expert in (first, leader, last)]
        torch.testing.assert_close(getattr(merged, name), (3 * parts[0] + parts[1] + 2 * parts[2]) / 6)
        torch.testing.assert_close(getattr(averaged, name), sum(getattr(expert, name) for expert in experts) / 3)


def test_merge_aligns_all_experts_to_the_first_of_their_layer_as_the_authors():
    """Also where that is in another group; in numpy, by trying all orders of hidden units."""
    layer, usage = random_layer(), [0.3, 0.4, 0.1, 0.2]
    for name in ("up", "bias_up", "down"):  # four hidden units, so that all orders can be tried
        setattr(layer.experts, name, nn.Parameter(getattr(layer.experts, name)[:, :4].clone(), False))
    (groups,) = groups_of("merge", [read(usage, logits_in_blocks(1, 3))], 2)
    assert groups == [Group((0,), 0, 0), Group((1, 2, 3), 1, 0)]
    first, *others = (expert_of(layer.experts, index) for index in range(4))

    def units(expert: Expert, order: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
        return torch.cat([expert.up_HD, expert.bias_up_H[:, None], expert.down_HD], 1)[list(order)]

    orders = list(itertools.permutations(range(4)))
    found = [max(orders, key=lambda order: float((units(first) * units(other, order)).sum())) for other in others]
    assert any(order != (0, 1, 2, 3) for order in found)
    expected = sum(share * units(other, order) for share, other, order in zip((4, 1, 2), others, found, strict=True)) / 7
    torch.testing.assert_close(units(merging.combine(layer, groups[1], read(usage))), expected)
    leader = merging.combine(layer, groups[1]._replace(reference=None), read(usage))
    assert (units(leader) - expected).abs().max() > 0.1


def test_merge_is_by_the_cosine_over_all_tokens():
    """Brute force over every token, where the sample of two says otherwise."""
    torch.manual_seed(3)
    host = nn.Sequential(nn.Sequential(nn.Linear(D, 5 * H), nn.ReLU(), nn.Linear(5 * H, D)))
    model, x = sd.moefy(host, sd.SMoEConfig(num_experts=5, top_k=2, router="learned", init_std=0.5)), torch.randn(300, D)
    (_, layer), passes = sd.moe_layers(model)[0], [(lambda part=part: model(part), None) for part in x.split(100)]
    calibration = sd.calibrate(model, passes, k=2, sample=2).layers[0]
    logits = (x @ layer.router.weight.T + layer.router.bias).detach()
    cosine = torch.tensor([[torch.cosine_similarity(logits[:, i], logits[:, j], dim=0) for j in range(5)] for i in range(5)])
    torch.testing.assert_close(merging.similarity_of_all(calibration), cosine, rtol=1e-4, atol=1e-5)
    leaders = sorted(calibration.usage_E.topk(2).indices.tolist())
    nearest = [leader if leader in leaders else max(leaders, key=lambda one: cosine[leader, one]) for leader in range(5)]
    (of_all,), (of_sample,) = (groups_of("merge", [calibration], 2, compare=name) for name in ("all", "sample"))
    assert [group.members for group in of_all] == [tuple(e for e in range(5) if nearest[e] == leader) for leader in leaders]
    assert of_sample != of_all
    with pytest.raises(sd.ConfigError, match="make it again, or give compare='sample'"):
        groups_of("merge", [calibration._replace(products_EE=None)], 2)


@pytest.mark.parametrize("method", METHODS)
def test_single_expert_is_unchanged_bit_for_bit(method):
    layer = random_layer()
    found = METHODS[method].combine(layer, Group((1,), 1), read([0.25] * 4))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expert_of(layer.experts, 1), strict=True))


TWINS = {"mean": {}, "uniform": {"gate_weight": "uniform"}, "dense": {"output_scale": "dense"}}


def model_of_twins(permuting: bool, **settings) -> nn.Module:
    """Two layers with two pairs of twins each: equal experts with the same router row."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(D, 4 * H), nn.GELU(), nn.Linear(4 * H, D)) for _ in range(2))
    model = sd.moefy(nn.Sequential(*blocks).double(), sd.SMoEConfig(num_experts=4, top_k=4, **settings)).eval()
    with torch.no_grad():
        for _, layer in sd.moe_layers(model):
            for parameter in [*layer.experts.parameters(), layer.router.weight]:
                nn.init.normal_(parameter, 0.0, 0.5)
            for index in (0, 1):
                order = torch.randperm(H) if permuting else torch.arange(H)
                put(layer, index + 2, permuted(expert_of(layer.experts, index), order))
                layer.router.weight[index + 2] = layer.router.weight[index]
    return model


def calibrated(model: nn.Module, seed: int = 0) -> sd.Calibration:
    x = torch.randn(128, D, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))
    return sd.calibrate(model, [(lambda: model(x), None)], k=2, seed=seed)


def with_usage(calibration: sd.Calibration, usage: list[float]) -> sd.Calibration:
    return replace(
        calibration, layers=tuple(layer._replace(usage_E=torch.tensor(usage, dtype=torch.float64)) for layer in calibration.layers)
    )


ALIGNING = {"merge": True, "uncurl": True, "average": False, "hc_smoe": False}
WAYS = [(method, {"by_layer": True} if method in ("merge", "average") else {}, aligning) for method, aligning in ALIGNING.items()]


@pytest.mark.parametrize("settings", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize(("method", "options", "permuting"), WAYS)
def test_merging_twins_is_lossless_at_any_k(method, options, permuting, settings):
    """With k pairs active, the four experts give what the k merged ones give, if the two most used experts are not twins."""
    model = model_of_twins(permuting, **settings)
    calibration = with_usage(calibrated(model), [0.4, 0.3, 0.2, 0.1])
    smaller, config = sd.operate(model, method, 2, calibration, **options)
    assert config.num_experts == 2 and [layer.num_experts for _, layer in sd.moe_layers(smaller)] == [2, 2]
    x = torch.randn(16, D).double()
    for k in (1, 2):
        with sd.top_k(model, 2 * k), sd.top_k(smaller, k), torch.no_grad():
            torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("keep", [1, 2, 3, 4])
@pytest.mark.parametrize(("method", "permuting"), ALIGNING.items())
def test_merging_copies_of_one_expert_is_lossless_for_any_keep(method, permuting, keep, settings):
    """For any routing; merge and average leave different numbers of experts in the layers."""
    model = model_of_twins(False, **settings)
    for _, layer in sd.moe_layers(model):
        one = Expert(*(tensor.clone() for tensor in expert_of(layer.experts.requires_grad_(False), 0)))
        for index in range(1, 4):
            put(layer, index, permuted(one, torch.randperm(H)) if permuting else one)
    smaller, _ = sd.operate(model, method, keep, calibrated(model))
    x = torch.randn(16, D).double()
    sizes = [layer.num_experts for _, layer in sd.moe_layers(smaller)]
    assert sum(sizes) == 2 * keep
    with torch.no_grad():
        for k in range(1, max(sizes) + 1):
            with sd.top_k(smaller, k):
                torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-5)


def test_merged_model_has_the_dominant_experts_router_rows_and_records_experts_by_layer():
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(D, 4 * H), nn.ReLU(), nn.Linear(4 * H, D)) for _ in range(2))
    model = sd.moefy(nn.Sequential(*blocks), sd.SMoEConfig(num_experts=4, top_k=2, init_std=0.5)).eval()
    (_, first), _ = sd.moe_layers(model)
    with torch.no_grad():
        first.router.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))  # two experts receive nearly all tokens of the first layer
    before, calibration = copy.deepcopy(model.state_dict()), calibrated(model)
    smaller, config = sd.operate(model, "merge", 2, calibration)
    assert config.experts_by_layer is None or sum(config.experts_by_layer) == 4
    found = groups_of("merge", calibration.layers, 2)
    for (_, layer), (_, old), groups in zip(sd.moe_layers(smaller), sd.moe_layers(model), found, strict=True):
        leaders = [group.leader for group in groups]
        assert torch.equal(layer.router.weight, old.router.weight[leaders])
        assert torch.equal(layer.router.bias, old.router.bias[leaders])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_model(method):
    model = model_of_twins(True)
    one, other = (sd.operate(model, method, 3, calibrated(model, seed=5))[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
