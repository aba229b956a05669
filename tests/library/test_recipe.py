"""Conversion of trained models by data: exact with all experts, better with few than a cut without data, and taken back if it fails."""

import pytest
import torch
import transformers
from torch import nn

import smoe_dropout as sd
from smoe_dropout.routers import mlp

GROUPS, H, D = 4, 6, 8
TOKENS = torch.arange(D).repeat(4, 8)


def planted() -> nn.Module:
    """A model of which each token needs a quarter of the hidden neurons, in no order, and no others."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(D, GROUPS * H), nn.ReLU(), nn.Linear(GROUPS * H, D))
    model = nn.Sequential(nn.Embedding(D, D), ffn)
    group_F = torch.randperm(GROUPS * H) % GROUPS
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(D))
        ffn[0].weight.copy_((group_F[:, None] == torch.arange(D) % GROUPS) * (0.5 + torch.rand(GROUPS * H, D)))
        ffn[0].bias.fill_(-0.1)
    return model.train()


def passes(model: nn.Module, count: int = 4) -> list:
    """Passes that return the squared distance from what the model computes now."""
    with torch.no_grad():
        before = model(TOKENS)
    return [(lambda: (model(TOKENS) - before).square().mean(), None)] * count


def test_tokens_find_their_neurons_together(monkeypatch):
    """With one of four experts a fitted cut loses little of what the model computes; random routers and other cuts lose much more."""
    monkeypatch.setattr(mlp, "STEPS", 150)
    losses = {}
    for settings in ({}, {"router": "mlp"}, {"cut": "contiguous"}, {"router": "random"}):
        model = planted()
        before = model(TOKENS)
        done = sd.convert(model, passes(model), GROUPS, **settings)
        assert model.training and all(layer.training for _, layer in sd.moe_layers(model))
        torch.testing.assert_close(model(TOKENS), before)
        assert sorted(done.losses) == [1, 2, 3, 4] and done.losses[4] < 1e-10 and done.tokens == 3 * TOKENS.numel()
        losses[str(settings)] = done.losses[1]
    *fitted, contiguous, unfitted = losses.values()
    assert 4 * max(fitted) < min(contiguous, unfitted), losses


@pytest.mark.parametrize(("correction", "shared"), [("norm", 0), ("mean", 1)])
def test_corrections_lower_the_loss_below_all_experts_and_leave_all_alone(correction, shared):
    models, losses = [planted(), planted()], []
    for model, given in zip(models, ("none", correction), strict=True):
        done = sd.convert(model, passes(model), GROUPS, router="random", cut="random", shared_experts=shared, correction=given)
        assert done.losses[GROUPS] < 1e-10
        losses.append(done.losses[3])
    assert losses[1] < losses[0]
    torch.testing.assert_close(sd.set_top_k(models[1], GROUPS) or models[1](TOKENS), planted()(TOKENS))


def test_masked_positions_do_not_count():
    """The cut is that of the tokens that count, and the loss of a pass weighs as many as it has."""
    seen = []
    for mask in (None, TOKENS < 4):
        model = planted()
        (run, _), *_ = passes(model)
        done = sd.convert(model, [(run, mask)] * 3, GROUPS)
        seen.append(done.tokens)
    assert seen == [2 * TOKENS.numel(), TOKENS.numel()]


def test_a_conversion_follows_from_its_seed_and_draws_nothing_outside():
    states = []
    for seed in (1, 1, 2):
        model, state = planted(), torch.get_rng_state()
        sd.convert(model, passes(model), GROUPS, cut="random", seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        states.append([*model.parameters()])
    same = [all(map(torch.equal, states[0], other)) for other in states[1:]]
    assert same == [True, False]


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"shared_experts": 1, "correction": "mean"}, {"router": "representative", "correction": "norm"}, {"router": "mlp"}],
    ids=str,
)
def test_a_converted_model_is_saved_and_loaded(settings, tmp_path, monkeypatch):
    """Any of its settings, without the data, and with what its loss was; in transformers' own classes, too."""
    monkeypatch.setattr(mlp, "STEPS", 10)
    model, ids = llama(), torch.arange(30)[None]
    before = model(input_ids=ids).logits
    done = sd.convert(model, [(lambda: model(input_ids=ids, labels=ids).loss, None)] * 2, 4, **settings)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert done.losses[4] == pytest.approx(done.dense_loss, abs=1e-5) and done.losses[2] != pytest.approx(done.dense_loss, abs=1e-5)
    sd.set_top_k(model, 2)
    sd.save_pretrained(model, tmp_path)
    for loaded in (sd.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert loaded(input_ids=ids, labels=ids).loss.item() == pytest.approx(done.losses[2], abs=1e-6)
        assert sd.moe_layers(loaded)[0][1].config.cut == "coactivation"
    text = str(done)
    assert "2 feed-forward networks of 32 hidden units cut into 4 experts" in text and f"{done.losses[2]:.4f}" in text


def returns(value: object):
    return lambda model: [(lambda: model(TOKENS) is None or value, None)] * 2


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (lambda model: passes(model, 1), {}, "passes has 1 pass: give at least 2"),
        (returns(None), {}, "a pass returned a NoneType: it must return its mean loss"),
        (returns(float("nan")), {}, "the loss of a pass is nan"),
        (lambda model: [(lambda: 0.0, None)] * 2, {}, "no position of the calibration data reached 1"),
        (
            lambda model: [(run, torch.ones(3, dtype=torch.bool)) for run, _ in passes(model, 2)],
            {},
            "the mask has 3 positions, but '1' read 256",
        ),
        (lambda model: 3, {}, "passes is a int, not pairs"),
        (passes, {"num_experts": 5}, "24 of '1' is not divisible by num_experts = 5"),
        (passes, {"cut": "nope"}, "unknown cut 'nope'"),
        (passes, {"correction": "more"}, "unknown correction 'more'"),
        (passes, {"correction": "mean"}, "set shared_experts to at least 1"),
        (passes, {"router": "hash"}, "gate_weight = 'unit' has no effect with router 'hash'"),
        (passes, {"gate_weight": "softmax", "correction": "norm"}, "is of a sum of experts, which gate_weight = 'softmax' does not form"),
        (passes, {"gate_weight": "sigmoid"}, "unknown gate_weight 'sigmoid'"),
        (passes, {"expert_init": "fresh"}, "expert_init = 'fresh' is not for convert"),
        (passes, {"expert_init": "copy", "gate_weight": "unit", "correction": "none"}, "expert_init = 'copy' makes too large"),
        (passes, {"expert_init": "copy", "cut": "weights"}, "cut = 'weights' has no effect with expert_init = 'copy'"),
        (passes, {"expert_init": "copy", "router": "mlp"}, "router = 'mlp' is fitted to a cut, and copies have none"),
        (passes, {"top_k": 2}, "top_k = 2 is not for convert"),
        (passes, {"nope": 2}, "unknown field nope"),
    ],
)
def test_refusals_leave_the_model_as_it_was(make, settings, said):
    model = planted()
    before, given = model(TOKENS), make(model)
    with pytest.raises(sd.ConfigError, match=said):
        sd.convert(model, given, **{"num_experts": GROUPS, **settings})
    assert not sd.moe_layers(model) and torch.equal(model(TOKENS), before) and all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"expert_init": "copy"}, 1e-5), ({"gate_weight": "softmax"}, None), ({"gate_weight": "softmax", "router": "random"}, 0.1)],
    ids=str,
)
def test_routers_that_learn_have_weights_that_depend_on_them(settings, tolerance):
    """Copies are exact at every k; of cut experts, a router with nearly equal weights is nearly so with all."""
    model, ids = llama(), torch.arange(30)[None]
    done = sd.convert(model, [(lambda: model(input_ids=ids, labels=ids).loss, None)] * 2, 4, **settings)
    ks = done.losses if "expert_init" in settings else [4]
    assert tolerance is None or all(done.losses[k] == pytest.approx(done.dense_loss, abs=tolerance) for k in ks)
    assert done.width == 32 and ("copied to 4 experts" in str(done)) == ("expert_init" in settings)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for _, layer in sd.moe_layers(model):
        weight = layer.router.weight
        assert weight.requires_grad == (done.config.router == "learned") and (weight.grad is None or weight.grad.any())


@pytest.mark.parametrize(
    "settings", [{"shared_experts": 1, "correction": "mean"}, {"gate_weight": "softmax"}, {"expert_init": "copy"}], ids=str
)
def test_a_stop_in_the_middle_is_taken_back(settings):
    """The neurons of the networks that were cut already have another order then."""
    model, ids = llama(), torch.arange(30)[None]
    before, lines = model(input_ids=ids).logits, []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run = (lambda: model(input_ids=ids, labels=ids).loss, None)
        sd.convert(model, [run] * 2, 4, **settings, say=stop)
    assert lines == ["read 30 tokens to fit to", "model.layers.0.mlp: 1 of 2"] and not sd.moe_layers(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    with pytest.raises(sd.ConfigError, match="has MoE layers already"):
        sd.convert(sd.moefy(model, sd.SMoEConfig.exact(4)), [run] * 2, 4)
