"""Adopted models: those with a mixture of experts of their own, whose blocks become MoE layers that compute the same."""

import copy

import pytest
import torch
from torch import Tensor, nn

import smoe_dropout as sd
from smoe_dropout.native import native_blocks

transformers = pytest.importorskip("transformers")

COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE, LATENT = {"moe_intermediate_size": 24, "intermediate_size": 20}, {"kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 1}
LOCAL = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
NUMBERED = {**WIDE, "num_experts": 6, "num_experts_per_tok": 2}
ROUTED = {**WIDE, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
SPARSE = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_heads": 2}

# the families whose every property is tested
FAMILIES = {
    "mixtral": LOCAL,
    "olmoe": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**NUMBERED, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**NUMBERED, "norm_topk_prob": True, "head_dim": 8},
    "deepseek_v2": {**ROUTED, **LATENT, "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7},
    "deepseek_v3": {**ROUTED, **LATENT, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    "switch_transformers": {"d_model": 16, "d_kv": 8, "d_ff": 24, **SPARSE, "num_experts": 4, "expert_capacity": 3},
}
# others that are recognised, although nothing knows their names
RELATIVES = {
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 20},
    "jamba": {**NUMBERED, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4},
    "minimax": {**LOCAL, "head_dim": 8},
    "minimax_m2": {**LOCAL, "head_dim": 8},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1, "head_dim": 8},
    "ernie4_5_moe": {**WIDE, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": {"intermediate_size": 24, "num_experts": 6, "moe_topk": 2, "head_dim": 8},
    "qwen3_vl_moe_text": {**NUMBERED, "head_dim": 8},
    "afmoe": {**NUMBERED, "num_shared_experts": 1, "head_dim": 8, "num_dense_layers": 1},
    "aria_text": {"intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 2},
    "dots1": {**ROUTED, "first_k_dense_replace": 1, "head_dim": 8},
    "flex_olmo": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "exaone_moe": {**NUMBERED, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "lfm2_moe": {**NUMBERED, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
}
# what is not an MoE layer, and why
REFUSED = {
    "phimoe": (LOCAL, "on random inputs it computes something other than"),
    "jetmoe": ({**LOCAL, "kv_channels": 8}, "it has 'bias' besides its experts"),
    "gpt_oss": ({**LOCAL, "head_dim": 8}, "it returns a tuple"),
    "llama4_text": ({**LOCAL, "intermediate_size_mlp": 24, "head_dim": 8, "interleave_moe_layer_step": 1}, "it returns a tuple"),
}
TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k")
BEYOND = {"deepseek_v2": 4, "deepseek_v3": 4, "switch_transformers": 1}  # largest k at which the native code is defined
TOKENS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def made(family: str) -> nn.Module:
    """A tiny model in evaluation mode, with weights, biases and correction biases large enough to matter."""
    settings = {**FAMILIES, **RELATIVES, **{name: settings for name, (settings, _) in REFUSED.items()}}[family]
    own = ("vocab_size", "pad_token_id") if family == "switch_transformers" else COMMON
    config = transformers.CONFIG_MAPPING[family](**{name: COMMON[name] for name in own}, **settings)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.normal_(0, 0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found = model(**inputs(model), use_cache=False)
    return found.last_hidden_state if "last_hidden_state" in found else found.logits


def inputs(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {})}


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def natives() -> dict[str, nn.Module]:
    return {family: made(family) for family in FAMILIES}


def adopted(natives: dict[str, nn.Module], family: str, **changes) -> nn.Module:
    return sd.adopt(copy.deepcopy(natives[family]), **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_k_computes_what_the_native_code_computes_at_that_k(natives, family):
    native = copy.deepcopy(natives[family])
    model = sd.adopt(copy.deepcopy(native))
    assert not native_blocks(model) and model.config.smoe_dropout["adopted"] == family
    assert error(logits(model), logits(native)) < 1e-6
    before, E = logits(model), sd.moe_layers(model)[0][1].num_experts
    for k in range(1, E + 1):
        for module in native.modules():
            vars(module).update({name: k for name in TOP_K if isinstance(vars(module).get(name), int)})
        with sd.top_k(model, k):
            found = logits(model)
            assert all(layer.assigned.shape[1] == k for _, layer in sd.moe_layers(model))
        if k <= BEYOND.get(family, E):
            assert error(found, logits(native)) < 1e-6, k
        if k != sd.get_top_k(model):
            assert error(found, before) > 1e-3, k


@pytest.mark.parametrize("family", RELATIVES)
def test_models_that_nothing_knows_by_name(family):
    model = made(family)
    before = logits(model)
    assert error(logits(sd.adopt(model)), before) < 1e-6


@pytest.mark.parametrize("family", REFUSED)
def test_refusal_names_the_block_and_the_reason(family):
    model = made(family)
    before, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(sd.ConfigError, match=rf"cannot become an MoE layer: {REFUSED[family][1]}"):
        sd.adopt(model)
    assert names == [name for name, _ in model.named_modules()] and torch.equal(logits(model), before)
    with pytest.raises(sd.ConfigError, match=r"is a mixture of experts already: use smoe_dropout\.adopt"):
        sd.moefy(model, sd.SMoEConfig(num_experts=2, top_k=1))


def test_unlisted_names_and_separate_maps_are_recognised():
    """A block of its own making: gate and up maps apart and not in this order, experts with biases, and a router with a bias."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.picker, self.scaling = nn.Linear(16, 5), 0.7
            self.pool = nn.ParameterDict({name: torch.randn(5, *shape) for name, shape in (("a", (16, 9)), ("b", (16, 9)), ("c", (9, 16)))})
            self.always = nn.Sequential(nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 16))
            self.top_k = 2

        def forward(self, x):
            weights, chosen = self.picker(x).sigmoid().topk(self.top_k, -1)
            a, b, c = (self.pool[name][chosen] for name in "abc")
            hidden = torch.einsum("...d,...kdh->...kh", x, a) * nn.functional.silu(torch.einsum("...d,...kdh->...kh", x, b))
            return torch.einsum("...k,...kh,...khd->...d", weights, hidden, c) * self.scaling + self.always(x)

    model, x = nn.Sequential(nn.Linear(16, 16), Own()), torch.randn(3, 4, 16)
    expected = model(x)
    sd.adopt(model)
    assert model[1].router.options.scale == 0.7 and torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    """A feed-forward network whose activation is a plain function."""

    def __init__(self, act):
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Listed(nn.Module):
    """A block with a router, a list of experts and a shared expert, under any names."""

    def __init__(self, act, names):
        super().__init__()
        self.top_k, self.names = 2, names
        for name, part in zip(names, (nn.Linear(16, 4), nn.ModuleList(Pair(act) for _ in range(4)), Pair(act)), strict=True):
            self.add_module(name, part)

    def forward(self, x):
        router, experts, shared = (getattr(self, name) for name in self.names)
        weights, chosen = router(x).softmax(-1).topk(self.top_k, -1)
        outputs = torch.stack([expert(x) for expert in experts], -2).gather(-2, chosen[..., None].expand(*chosen.shape, 16))
        return (outputs * weights[..., None]).sum(-2) + shared(x)


@pytest.mark.parametrize("names", [("gate", "experts", "always"), ("router", "branches", "shared")])
def test_blocks_that_differ_in_a_function_only_are_told_apart(names):
    """Also with names that a layer has already, and with experts that only the router tells from layers."""
    for act in (nn.functional.silu, nn.functional.gelu, lambda x: nn.functional.relu(x)):
        layers, x = nn.ModuleList(nn.ModuleDict({"moe": Listed(act, names)}) for _ in range(2)), torch.randn(3, 4, 16)
        expected = layers[1].moe(x)
        with pytest.raises(sd.ConfigError, match=r"use smoe_dropout.adopt\(model\) \('\*.moe' \(2 modules, Listed\)\)"):
            sd.moefy(layers, sd.SMoEConfig(4, 2))
        assert torch.allclose(sd.adopt(layers)[1].moe(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_decisions_are_identical(natives, family):
    """On the same input, in float32 and in bfloat16, the same experts as the native router's, in the same order of indices."""
    if family == "switch_transformers":
        pytest.skip("its router returns one-hot dispatch masks")
    for dtype in (torch.float32, torch.bfloat16):
        native = copy.deepcopy(natives[family]).to(dtype)
        x_ND = torch.randn(300, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
        gate = native_blocks(native)[-1][1].gate
        *_, indices_NK = gate(x_ND[None]) if "deepseek" in family else gate(x_ND)
        layer = sd.moe_layers(sd.adopt(native))[-1][1].eval()
        assert torch.equal(layer.route(x_ND).indices_NK.sort(1).values, indices_NK.sort(1).values), dtype


def test_capacity_of_switch_drops_the_same_tokens(natives):
    native = natives["switch_transformers"]
    block, model = native_blocks(native)[0][1], adopted(natives, "switch_transformers")
    layer = sd.moe_layers(model)[0][1]
    x = torch.randn(1, 1, 16).expand(2, 9, 16) + 0.01 * torch.randn(2, 9, 16)  # all tokens go to one expert
    found, expected = layer(x.clone()), block(x.clone())
    assert torch.allclose(found, expected, atol=1e-6)
    assert ((found == 0).all(-1) == (expected == 0).all(-1)).all() and (found == 0).all(-1).sum() == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_surgery_and_saved_folders(natives, family, tmp_path):
    model = adopted(natives, family)
    E = sd.moe_layers(model)[0][1].num_experts
    calibration = sd.calibrate(model, [(lambda: model(**inputs(model), use_cache=False), None)], k=E - 1)
    made = {"whole": model, "compressed": sd.compress(model, 4, kept=0.5)}
    made |= {name: sd.operate(model, name, E - 1, calibration, by_layer=True)[0] for name in ("merge", "drop")}
    made |= {name: sd.operate(model, name, E - 1, calibration)[0] for name in ("reap", "hc_smoe")}
    made["keep_best"] = sd.operate(model, "keep_best", 2, calibration)[0]
    assert torch.allclose(logits(sd.compress(model, 4)), logits(model), rtol=1e-4, atol=1e-5)
    for name, changed in made.items():
        sd.save_pretrained(changed, tmp_path / name)
        again = sd.from_pretrained(tmp_path / name)
        assert {n: p.requires_grad for n, p in again.named_parameters()} == {n: p.requires_grad for n, p in changed.named_parameters()}
        for k in (1, sd.get_top_k(changed)):
            with sd.top_k(changed, k), sd.top_k(again, k):
                assert torch.allclose(logits(again), logits(changed), rtol=1e-5, atol=1e-6), (name, k)


def test_uncurl_keeps_corrections_and_groups(natives):
    model = adopted(natives, "deepseek_v3")
    calibration = sd.calibrate(model, [(lambda: model(TOKENS), None)], k=8)
    made, config = sd.operate(model, "uncurl", 5, calibration)
    before, after = (sd.moe_layers(one)[0][1].router for one in (model, made))
    kept = [(before.weight == row).all(1).nonzero().item() for row in after.weight]
    assert (
        config.num_experts == 5 and torch.equal(after.correction, before.correction[kept]) and torch.equal(after.group, before.group[kept])
    )
    with sd.top_k(made, 5):
        assert torch.isfinite(logits(made)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_training(natives, family):
    """Routers and experts train, with the model's own balance coefficient; zero biases do not; gradient checkpointing changes nothing."""
    model = adopted(natives, family).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)  # for dropout, and Switch's jitter
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5) for name in gradients[0])
    coefficient = getattr(natives[family].config, "router_aux_loss_coef", 0.0)
    for name, layer in sd.moe_layers(model):
        assert gradients[0][f"{name}.router.weight"].norm() > 0 and gradients[0][f"{name}.experts.up"].norm() > 0
        assert not layer.experts.bias_up.requires_grad and not layer.experts.bias_up.any() and layer.router.bias is None
        assert layer.router.balance_loss == pytest.approx(coefficient * layer.top_k / len(sd.moe_layers(model)))
        assert bool(layer.losses) == bool(coefficient)


@pytest.mark.parametrize("asked", ["argument", "configuration"])
def test_balance_loss_is_the_native_one_and_counted_once(asked):
    """With one layer both losses are the same; the host's own code, which finds no routers of its class, is not asked."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**COMMON, **LOCAL, "num_hidden_layers": 1, "router_aux_loss_coef": 0.1})
    config.output_router_logits = asked == "configuration"
    native = transformers.MixtralForCausalLM(config).train()
    model, mask = sd.adopt(copy.deepcopy(native)), torch.ones_like(TOKENS).index_fill(1, torch.tensor([0, 1]), 0)
    given = {"output_router_logits": True} if asked == "argument" else {}
    found, expected = (one(TOKENS, attention_mask=mask, labels=TOKENS, **given) for one in (model, native))
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert torch.allclose(found.router_logits[0], expected.router_logits[0], atol=1e-6)
    assert model.config.router_aux_loss_coef * found.aux_loss.item() == pytest.approx(0.1 * expected.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_generation_with_a_cache(natives, family):
    found = [one.generate(TOKENS[:1], max_new_tokens=6, do_sample=False) for one in (natives[family], adopted(natives, family))]
    assert torch.equal(*found)


def test_trainer_saves_what_from_pretrained_loads(natives, tmp_path):
    pytest.importorskip("accelerate")
    model = adopted(natives, "qwen2_moe")
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=1)
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS]).train()
    assert torch.allclose(logits(sd.from_pretrained(tmp_path / "checkpoint-1")), logits(model.eval()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_device_and_precision(natives, family):
    with torch.device("meta"):
        model = sd.adopt(type(natives[family])(natives[family].config))
    other = adopted(natives, family)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
    assert sd.moe_layers(model)[0][1].config == sd.moe_layers(other)[0][1].config
    half = sd.adopt(copy.deepcopy(natives[family]).to(torch.bfloat16))
    for _, layer in sd.moe_layers(half):
        assert {parameter.dtype for parameter in layer.experts.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in layer.router.parameters()} == {torch.float32}


def test_maps_that_need_no_other_order_are_not_copied(natives):
    model = copy.deepcopy(natives["mixtral"])
    before = model.model.layers[0].mlp.experts.gate_up_proj
    sd.adopt(model)
    assert model.model.layers[0].mlp.experts.up is before


def test_settings_that_do_not_apply(natives):
    for changes, message in (
        ({"router": "learned"}, "router = 'learned' cannot be combined with adopted"),
        ({"method": "competesmoe"}, "method = 'competesmoe' cannot be combined with adopted"),
        ({"options": {"temperature": 2}}, "unknown option temperature"),
        ({"balance": 0.1}, "unknown field balance"),
    ):
        with pytest.raises(sd.ConfigError, match=message):
            adopted(natives, "mixtral", **changes)
    with pytest.raises(sd.ConfigError, match="has no mixture-of-experts blocks of its own"):
        sd.adopt(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(sd.ConfigError, match="has no mixture-of-experts blocks of its own"):
        sd.adopt(adopted(natives, "mixtral"))


def test_ways_that_an_adopted_model_shares_with_others(natives, tmp_path):
    """A report, a second conversion of the dense layers, weights of save_model; there is no way back to dense networks."""
    model = adopted(natives, "deepseek_v3")
    assert "8 experts of 24, 3 active" in str(sd.report(model))
    by_name = sd.moefy(copy.deepcopy(natives["deepseek_v3"]), sd.SMoEConfig.exact(4, sites="*.layers.0.mlp"))
    assert error(logits(by_name), logits(natives["deepseek_v3"])) < 1e-6 and len(sd.moe_layers(by_name)) == 1
    assert "mlp stays as it is: DeepseekV3MoE is a mixture of experts already" in str(sd.report(by_name))
    assert len(sd.moe_layers(sd.adopt(by_name))) == 2
    before = logits(model)
    sd.moefy(model, sd.SMoEConfig.exact(4, layers=(0,)))
    assert len(sd.moe_layers(model)) == 2 and error(logits(model), before) < 1e-6
    sd.set_top_k(model, 4)
    sd.save_pretrained(model, tmp_path / "both")
    assert torch.allclose(logits(sd.from_pretrained(tmp_path / "both")), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(sd.ConfigError, match="adoption is not taken back"):
        sd.unmoefy(model)
    one, other = adopted(natives, "olmoe"), adopted(natives, "olmoe")
    nn.init.normal_(one.model.layers[0].mlp.experts.up)
    sd.save_model(one, tmp_path / "weights")
    assert torch.equal(logits(sd.load_weights(other, tmp_path / "weights")), logits(one))
    with sd.top_k(one, 1):
        assert torch.equal(logits(sd.slim(other, 1)), logits(one))
    assert sd.expert_load(one).keys() == dict(sd.moe_layers(one)).keys()


def test_a_classifier_over_layers_is_not_a_block():
    """As many layers as classes do not make a mixture of experts."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))})
    model["head"] = nn.Linear(4, 3)
    assert not native_blocks(model)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.layers, self.head = nn.LSTM(4, 4), model["layers"], nn.Linear(4, 3)

    assert not native_blocks(nn.ModuleDict({"model": Classifier()}))
    assert not native_blocks(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 4)))
