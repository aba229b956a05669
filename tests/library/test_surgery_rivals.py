"""REAP, HC-SMoE and budgets by layer, against values worked out by plain code: on converted models, and on native ones before adoption."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smoe_dropout as sd
from smoe_dropout.surgery.budgets import AVERAGING, EQUAL, best
from smoe_dropout.surgery.hc_smoe import clusters

N, D, H, E = 40, 8, 6, 4


def split_model(activation: type[nn.Module] = nn.GELU, layers: int = 1, **settings) -> tuple[nn.Module, nn.Module]:
    """A stack of FFNs, and its conversion whose experts are parts of them."""
    torch.manual_seed(0)
    dense = (
        nn.Sequential(*(nn.Sequential(nn.Linear(D, E * H), activation(), nn.Linear(E * H, D)) for _ in range(layers)))
        .eval()
        .requires_grad_(False)
    )
    return dense, sd.moefy(copy.deepcopy(dense), sd.SMoEConfig.exact(E, init_std=0.5, **settings)).eval()


def calibrated(model: nn.Module, *batches: Tensor, **settings) -> sd.Calibration:
    return sd.calibrate(model, [(lambda x=x: model(x), None) for x in batches], **settings)


@pytest.mark.parametrize("settings", [{}, {"gate_weight": "softmax"}, {"gate_weight": "sigmoid", "output_scale": "mean"}], ids=str)
@pytest.mark.parametrize("k", [1, 3, E])
def test_outputs_of_experts_match_their_definition(k, settings):
    """Token by token, in double precision, from the weights of the dense network; over batches of different sizes."""
    dense, model = split_model(**settings)
    x_ND = torch.randn(N, D)
    (layer,) = calibrated(model, x_ND[:7], x_ND[7:], k=k).layers
    up, down = dense[0][0], dense[0][2]
    router, scale = sd.moe_layers(model)[0][1].router, 1.0 if settings.get("output_scale") else E
    saliencies, outputs_ED = [[] for _ in range(E)], torch.zeros(E, D).double()
    for x_D in x_ND.double():
        logits_E = router.weight.double() @ x_D + router.bias.double()
        chosen = sorted(range(E), key=lambda expert: -float(logits_E[expert]))[:k]
        exp = {expert: float(logits_E[expert].exp()) for expert in chosen}
        gates = {expert: value / sum(exp.values()) for expert, value in exp.items()}
        if not settings:
            gates = dict.fromkeys(chosen, 1 / k)
        elif settings["gate_weight"] == "sigmoid":
            gates = {expert: 1 / (1 + 1 / value) for expert, value in exp.items()}
        for expert in range(E):
            own = slice(expert * H, (expert + 1) * H)
            y_D = down.weight[:, own].double() @ F.gelu(up.weight[own].double() @ x_D + up.bias[own].double()) + down.bias.double() / E
            outputs_ED[expert] += y_D / N
            if expert in chosen:
                saliencies[expert].append(scale * gates[expert] * float(y_D.norm()))
    expected_E = torch.tensor([sum(found) / max(len(found), 1) for found in saliencies])
    torch.testing.assert_close(layer.saliency_E, expected_E, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.outputs_ED, outputs_ED.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_sum_of_experts_keeps_its_scale(keep):
    """E/k times the sum of the k chosen experts, as before, from the weights of the dense network."""
    dense, model = split_model()
    x_ND = torch.randn(N, D)
    calibration = calibrated(model, x_ND)
    smaller, config = sd.operate(model, "reap", keep, calibration)
    kept = sorted(calibration.layers[0].saliency_E.argsort(descending=True)[:keep].tolist())
    units = torch.cat([torch.arange(expert * H, (expert + 1) * H) for expert in kept])
    up, down = dense[0][0], dense[0][2]
    part_ND = F.gelu(F.linear(x_ND, up.weight[units], up.bias[units])) @ down.weight[:, units].T
    with torch.no_grad():
        torch.testing.assert_close(smaller(x_ND), E / keep * part_ND + down.bias, rtol=1e-5, atol=1e-5)
    assert config.num_experts == sd.get_top_k(smaller) == keep


def agglomerated(points_EC: Tensor, count: int) -> list[tuple[int, ...]]:
    """Average linkage by its definition: the two clusters with the smallest mean distance of their members become one."""
    found = [(index,) for index in range(len(points_EC))]
    while len(found) > count:
        pairs = [(a, b) for a in found for b in found if a < b]
        near = min(
            pairs,
            key=lambda pair: (
                sum(float((points_EC[i] - points_EC[j]).norm()) for i in pair[0] for j in pair[1]) / len(pair[0]) / len(pair[1])
            ),
        )
        found = [one for one in found if one not in near] + [tuple(sorted(sum(near, ())))]
    return sorted(found)


def test_clusters_are_those_of_average_linkage():
    for seed in range(6):
        points_EC = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed))
        assert all(clusters(points_EC, count) == agglomerated(points_EC, count) for count in range(1, 10)), seed
    assert [len(clusters(torch.zeros(5, 3), count)) for count in (1, 3, 5, 7)] == [1, 3, 5, 5]


def test_hc_smoe_merges_experts_with_alike_outputs_by_usage():
    """Whatever their routing: experts 0 and 3 compute nearly the same, and a merged expert is the mean weighted by usage."""
    _, model = split_model(layers=2)
    for _, layer in sd.moe_layers(model):
        for stacked in layer.experts.requires_grad_(False).parameters():
            stacked[3] = stacked[0] * 1.01
    calibration = calibrated(model, torch.randn(N, D), k=2)
    smaller, _ = sd.operate(model, "hc_smoe", 3, calibration)
    for (_, layer), (_, old), its in zip(sd.moe_layers(smaller), sd.moe_layers(model), calibration.layers, strict=True):
        first, last = (its.usage_E[[0, 3]] / its.usage_E[[0, 3]].sum()).tolist()
        for name, scale in (("up", 1.0), ("bias_up", 1.0), ("down", E / 3), ("bias_down", E / 3)):
            ours, theirs = getattr(layer.experts, name), getattr(old.experts, name)
            torch.testing.assert_close(ours[0], (first * theirs[0] + last * theirs[3]) * scale)
            torch.testing.assert_close(ours[1:], theirs[1:3] * scale)
        assert torch.equal(layer.router.weight, old.router.weight[[0 if first > last else 3, 1, 2]])


# models with a mixture of experts of their own


LLAMA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
NATIVE = {
    "mixtral": ("num_local_experts", {"intermediate_size": 24, "num_experts_per_tok": 2}),
    "olmoe": ("num_experts", {"intermediate_size": 24, "num_experts_per_tok": 3}),
    "qwen2_moe": (
        "num_experts",
        {"intermediate_size": 20, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 20},
    ),
}
TOKENS = torch.randint(3, 40, (8, 15), generator=torch.Generator().manual_seed(1))


def native(family: str, experts: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    name, settings = NATIVE[family]
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**LLAMA, **settings, **{name: experts})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("family", NATIVE)
def test_reap_on_native_models(family, tmp_path):
    """Saliencies from the model's own tensors, then a native model that has the kept half of the experts; a saved folder loads again."""
    model = native(family, 6)
    blocks = [block for block in model.modules() if hasattr(block, "experts") and hasattr(block, "gate")]
    inputs, hooks = [], [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1))) for block in blocks]
    model(TOKENS)
    [hook.remove() for hook in hooks]
    expected, k = [], model.config.num_experts_per_tok
    for block, x_ND in zip(blocks, inputs, strict=True):
        top = (x_ND @ block.gate.weight.T).softmax(-1).topk(k)
        gates_NK = top.values / top.values.sum(-1, keepdim=True) if family == "mixtral" else top.values
        saliency = []
        for expert, (into_HD, out_DH) in enumerate(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)):
            gate_NH, up_NH = (x_ND @ into_HD.T).chunk(2, -1)
            y_ND, chosen_NK = (F.silu(gate_NH) * up_NH) @ out_DH.T, top.indices == expert
            saliency.append(float((gates_NK * chosen_NK * y_ND.norm(dim=1)[:, None]).sum() / chosen_NK.sum().clamp(min=1)))
        expected.append(torch.tensor(saliency))
    kept = [saliency_E.argsort(descending=True)[:3].sort().values for saliency_E in expected]
    half, state = native(family, 3), model.state_dict()
    for place, block in enumerate(name for name, module in model.named_modules() if module in blocks):
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            state[f"{block}.{name}"] = state[f"{block}.{name}"][kept[place]]
    half.load_state_dict(state)
    calibration = calibrated(sd.adopt(model), TOKENS)
    for layer, saliency_E in zip(calibration.layers, expected, strict=True):
        torch.testing.assert_close(layer.saliency_E, saliency_E, rtol=1e-4, atol=1e-6)
    smaller, config = sd.operate(model, "reap", 3, calibration)
    torch.testing.assert_close(smaller(TOKENS).logits, half(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert config.num_experts == 3 and config.adopted == family
    pooled, _ = sd.operate(model, "hc_smoe", 3, calibration, pooled=True, at_least=2)
    sd.save_pretrained(pooled, tmp_path)
    assert torch.equal(sd.from_pretrained(tmp_path)(TOKENS).logits, pooled(TOKENS).logits)
    assert sum(layer.num_experts for _, layer in sd.moe_layers(pooled)) == 6


# budgets


FIRST, SECOND = [0.7, 0.1, 0.15, 0.05], [0.25, 0.26, 0.25, 0.24]


@pytest.mark.parametrize(
    ("keep", "options", "expected"),
    [
        (2, EQUAL, [[0, 2], [0, 1]]),
        (4, EQUAL, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (2, {**EQUAL, "pooled": True}, [[0], [0, 1, 2]]),
        (2, AVERAGING, [[0], [0, 1, 2]]),
        (2, {**AVERAGING, "by_layer": True}, [[0, 2], [0, 1]]),
        (3, {**EQUAL, "pooled": True}, [[0, 2], [0, 1, 2, 3]]),
        (3, {**EQUAL, "pooled": True, "at_least": 3}, [[0, 1, 2], [0, 1, 2]]),
    ],
    ids=str,
)
def test_budgets(keep, options, expected):
    scores = [torch.tensor(FIRST), torch.tensor(SECOND)]
    assert best(scores, keep, options) == expected
    assert best([scores[0], scores[1], torch.ones(1)], keep, options)[2] == [0], "a layer with fewer experts keeps all"


@pytest.mark.parametrize("method", ["keep_best", "uncurl", "reap", "hc_smoe"])
def test_pooled_budgets_follow_the_scores_of_all_layers(method):
    """Saliencies of one layer are a hundred times larger, which must not decide how many it keeps."""
    _, model = split_model(layers=2)
    found = calibrated(model, torch.randn(N, D), k=2)
    layers = [
        its._replace(usage_E=torch.tensor(one).double(), saliency_E=torch.tensor(one) * 100**place)
        for place, (its, one) in enumerate(zip(found.layers, (FIRST, SECOND), strict=True))
    ]
    smaller, config = sd.operate(model, method, 2, replace(found, layers=tuple(layers)), pooled=True)
    assert [layer.num_experts for _, layer in sd.moe_layers(smaller)] == [1, 3] and config.experts_by_layer == (1, 3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("reap", {"pooled": True, "at_least": 3}, "at_least = 3 must be from 1 to keep = 2"),
        ("reap", {"at_least": 2}, "at_least = 2 has no effect with the same number of experts in every layer"),
        ("merge", {"by_layer": True, "at_least": 2}, "at_least = 2 has no effect with the same number of experts in every layer"),
        ("hc_smoe", {"pooled": 1}, "pooled"),
    ],
)
def test_wrong_budgets_are_rejected(method, options, message):
    _, model = split_model()
    with pytest.raises(sd.ConfigError, match=message):
        sd.operate(model, method, 2, calibrated(model, torch.randn(N, D)), **options)


def test_calibrations_of_earlier_versions(tmp_path):
    """They load, serve the methods that need no outputs, and are refused by the others; a damaged file is not one of them."""
    _, model = split_model(layers=2)
    calibration = calibrated(model, torch.randn(N, D), k=2)
    calibration.save(tmp_path / "new")
    tensors = load_file(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        header = file.metadata()
    old = {name: tensor for name, tensor in tensors.items() if not name.endswith(("saliency_E", "outputs_ED"))}
    save_file(old, tmp_path / "old", header)
    loaded = sd.Calibration.load(tmp_path / "old")
    assert sd.operate(model, "merge", 2, loaded)[1].d_expert == H
    for method in ("reap", "hc_smoe"):
        with pytest.raises(sd.ConfigError, match="the calibration has no outputs of the experts: make it again with outputs=True"):
            sd.operate(model, method, 2, loaded)
    assert calibrated(model, torch.randn(N, D), outputs=False).layers[0].outputs_ED is None
    for name, tensor in (("0.saliency_E", torch.ones(E + 1)), ("1.outputs_ED", torch.ones(E, D - 1)), ("0.usage_E", torch.ones(E, 1))):
        save_file(tensors | {name: tensor}, tmp_path / "wrong", header)
        with pytest.raises(sd.ConfigError, match="do not fit together"):
            sd.Calibration.load(tmp_path / "wrong")


# plain sums of experts, as `convert` makes them


def summed_model(router: str, **settings) -> tuple[nn.Module, sd.Calibration]:
    """A conversion with unit gate weights, and its calibration at three of four experts."""
    _, model = split_model(layers=2, gate_weight="unit", output_scale="mean", router=router, **settings)
    with torch.no_grad():
        for _, layer in sd.moe_layers(model):
            layer.router.factor.copy_(torch.tensor([1.6, 1.3, 1.1, 1.0]))
            for parameter in layer.router.parameters():
                parameter.normal_(0, 0.5)
    return model, calibrated(model, torch.randn(N, D), k=3)


ROUTER_OPTIONS = {"random": {}, "mlp": {"router_width": 2 * E}, "representative": {"activation": "silu_gated"}}


@pytest.mark.parametrize(("router", "options"), ROUTER_OPTIONS.items())
@pytest.mark.parametrize("shared", [0, 1])
@torch.no_grad()
def test_a_plain_sum_is_not_rescaled(router, options, shared, tmp_path):
    """With experts dropped it is the sum of the chosen ones times the factor of their number; shared ones stay, however little they do."""
    model, calibration = summed_model(router, options=options, shared_experts=shared)
    for _, layer in sd.moe_layers(model):
        layer.experts.down[:shared] *= 1e-3
        layer.experts.bias_down[:shared] *= 1e-3
    calibration = calibrated(model, torch.randn(N, D), k=3)
    smaller, config = sd.operate(model, "reap", 3, calibration)
    x_ND = torch.randn(N, D)
    for k in (1, 2, 3):
        y_ND = x_ND
        for (_, layer), its in zip(sd.moe_layers(model), calibration.layers, strict=True):
            ranked = [expert for expert in its.saliency_E.argsort(descending=True).tolist() if expert >= shared]
            kept = [*range(shared), *ranked[: 3 - shared]]
            logits_NE, each_NED = layer.router.logits(y_ND), layer.experts.each(y_ND)
            rows = []
            for logits_E, each_ED in zip(logits_NE.tolist(), each_NED, strict=True):
                chosen = sorted(kept, key=lambda expert: (expert >= shared, -logits_E[expert]))[:k]
                rows.append([1.6, 1.3, 1.1][k - 1] * sum(each_ED[expert] for expert in chosen))
            y_ND = torch.stack(rows)
        with sd.top_k(smaller, k):
            torch.testing.assert_close(smaller(x_ND), y_ND, rtol=1e-4, atol=1e-5)
    assert (config.num_experts, config.shared_experts, config.gate_weight) == (3, shared, "unit")
    sd.save_model(smaller, tmp_path)
    dense, _ = split_model(layers=2)
    assert torch.equal(sd.load_weights(sd.moefy(dense, config), tmp_path).eval()(x_ND), smaller(x_ND))


@pytest.mark.parametrize(
    ("method", "options"), {"merge": {"by_layer": True}, "average": {"by_layer": True}, "uncurl": {}, "hc_smoe": {}}.items()
)
@torch.no_grad()
def test_a_merged_expert_of_a_plain_sum_is_the_sum_of_its_members(method, options):
    """Copies of two experts merge without loss where all are active."""
    model, _ = summed_model("random")
    for _, layer in sd.moe_layers(model):
        for stacked in (*layer.experts.parameters(), layer.router.weight, layer.router.bias):
            stacked[2] = stacked[3] = stacked[1]
    calibration = calibrated(model, torch.randn(N, D), k=3)
    usage_E = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    calibration = replace(calibration, layers=tuple(its._replace(usage_E=usage_E) for its in calibration.layers))
    smaller, _ = sd.operate(model, method, 2, calibration, **options)
    assert [layer.num_experts for _, layer in sd.moe_layers(smaller)] == [2, 2]
    with sd.top_k(model, E):
        torch.testing.assert_close(smaller(x_ND := torch.randn(N, D)), model(x_ND), rtol=1e-4, atol=1e-5)
    assert sd.moe_layers(smaller)[0][1].router.factor.tolist() == pytest.approx([1.3, 1.0])


def test_shared_experts_are_not_counted():
    model, calibration = summed_model("random", shared_experts=2)
    with pytest.raises(sd.ConfigError, match="keep = 2 must be above the 2 shared experts, which are kept"):
        sd.operate(model, "reap", 2, calibration)
    for method in ("merge", "uncurl", "keep_best", "drop", "average", "reap", "hc_smoe"):
        smaller, _ = sd.operate(model, method, 3, calibration)
        for (_, layer), (_, old) in zip(sd.moe_layers(smaller), sd.moe_layers(model), strict=True):
            assert torch.equal(layer.experts.up[:2], old.experts.up[:2]) and layer.num_experts >= 3
