"""Converted models return their auxiliary loss and router logits as Mixtral does."""

import copy

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.routers import switch_balance_loss
from tests.library.test_hosts import TOKENS, made
from tests.library.test_transformers_trainer import BALANCE, sparse, undropped

transformers = pytest.importorskip("transformers")


def unweighted(model: nn.Module) -> float:
    return sd.auxiliary_loss(model).item() / BALANCE


@pytest.mark.parametrize("host", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_outputs_on_request(host, by):
    """The loss is the same with and without."""
    model, asked = sparse(host).train(), {}
    assert model.config.router_aux_loss_coef == BALANCE and model.config.output_router_logits is False
    plain = model(TOKENS, labels=TOKENS)
    assert "aux_loss" not in plain and "router_logits" not in plain
    if by == "argument":
        asked = {"output_router_logits": True}
    else:
        model.config.output_router_logits = True
        assert "aux_loss" not in model(TOKENS, output_router_logits=False)
    output = model(TOKENS, labels=TOKENS, **asked)
    assert torch.equal(output.loss, plain.loss) and output.aux_loss.item() == pytest.approx(unweighted(model), rel=1e-6)
    layers = [layer for _, layer in sd.moe_layers(model)]
    assert [logits.shape for logits in output.router_logits] == [(TOKENS.numel(), 4)] * 3
    by_hand = sum(switch_balance_loss(logits, layer.assigned) for logits, layer in zip(output.router_logits, layers, strict=True))
    torch.testing.assert_close(output.aux_loss, by_hand)
    without = model(TOKENS, **asked)  # labels
    assert without.aux_loss.requires_grad and without.get("loss") is None
    whole = model(TOKENS, labels=TOKENS, return_dict=False, **asked)
    assert torch.equal(whole[0], plain.loss) and torch.equal(whole[-2], output.aux_loss) and len(whole[-1]) == 3
    evaluated = model.eval()(TOKENS, labels=TOKENS, **asked)
    assert evaluated.aux_loss == 0 and len(evaluated.router_logits) == 3 and evaluated.loss < plain.loss
    with pytest.raises(IndexError):
        model(TOKENS + 10**6, **asked)
    assert all(layer.router.shown is None for layer in layers)


def test_coefficient_changes_the_loss_and_is_kept_by_copies():
    model = sparse("llama").train()
    plain = model(TOKENS, labels=TOKENS).loss.item() - sd.auxiliary_loss(model).item()
    for coefficient in (0.0, 0.1):
        model.config.router_aux_loss_coef = coefficient
        for one in (model, copy.deepcopy(model)):
            assert one(TOKENS, labels=TOKENS).loss.item() == pytest.approx(plain + coefficient * unweighted(one), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "coefficient"),
    [
        ({"router": "random"}, 0.0),
        ({"router": "learned"}, 0.01),
        ({"router": "noisy_top_k"}, 0.1),
        ({"router": "learned", "balance_loss": 0.0}, 0.0),
        ({"router": "learned", "balance_loss": 0.0, "method": "competesmoe", "options": {"times_balance": False}}, 1.0),
    ],
)
def test_coefficient_is_that_of_the_experts(settings, coefficient):
    model = sd.moefy(made("bert"), sd.SMoEConfig(4, 2, **settings))
    assert model.config.router_aux_loss_coef == coefficient
    assert model(TOKENS, output_router_logits=True).aux_loss == 0


def test_conversions_one_after_the_other_and_back():
    """Losses of both are added once; the dense model knows nothing of routers."""
    model = undropped("llama").train()
    before = set(vars(model.config))
    exact = {"num_experts": 4, "top_k": 4, "expert_init": "split", "gate_weight": "uniform", "output_scale": "dense"}
    sd.moefy(model, sd.SMoEConfig(**exact, layers=(0,)))
    sd.moefy(model, sd.SMoEConfig(**{**exact, "router": "uniform"}, layers=(1,)))
    sd.unmoefy(model)
    assert set(vars(model.config)) == before and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    plain = model(TOKENS, labels=TOKENS).loss
    sd.moefy(model, sd.SMoEConfig(**exact, layers=(0,)))
    assert model.config.router_aux_loss_coef == 0.0
    sd.moefy(model, sd.SMoEConfig(**exact, router="learned", balance_loss=BALANCE, layers=(1, 2)))
    assert model.config.router_aux_loss_coef == BALANCE
    with pytest.warns(UserWarning, match="the task does not train the router"):
        output = model(TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS, output_router_logits=True)
    auxiliary = sd.auxiliary_loss(model)
    torch.testing.assert_close(output.loss, plain + auxiliary)
    assert auxiliary > 1 and len(output.router_logits) == 3
    assert all(layer.uses[0].real_N.all() and len(layer.uses) == 1 for _, layer in sd.moe_layers(model))


def test_saved_configuration_loads(tmp_path):
    model = sparse("bert")
    model.config.output_router_logits = True
    sd.save_pretrained(model, tmp_path)
    again = sd.from_pretrained(tmp_path)
    assert again.config.output_router_logits and again.config.router_aux_loss_coef == BALANCE
    assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits) and "aux_loss" in again(TOKENS)


def test_compiled_and_checkpointed():
    """With the padding left out, too."""
    mask = torch.ones_like(TOKENS)
    mask[0, 5:] = 0
    model, asked = sparse("llama").train(), {"attention_mask": mask, "labels": TOKENS, "output_router_logits": True}
    unpadded, expected = model(TOKENS, output_router_logits=True), model(TOKENS, **asked)
    assert not torch.allclose(unpadded.aux_loss, expected.aux_loss, rtol=1e-4)
    expected.aux_loss.backward()
    gradients = [layer.router.weight.grad.clone() for _, layer in sd.moe_layers(model)]
    for how in ("compiled", "checkpointed"):
        model.zero_grad()
        run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        if how == "checkpointed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        output = run(TOKENS, **asked)
        torch.testing.assert_close(output.aux_loss, expected.aux_loss)
        assert len(output.router_logits) == 3
        output.aux_loss.backward()
        for (_, layer), gradient in zip(sd.moe_layers(model), gradients, strict=True):
            torch.testing.assert_close(layer.router.weight.grad, gradient)


def test_replicas_of_data_parallelism_return_their_own_losses():
    """nn.DataParallel runs copies that share the hooks of the model."""

    def replica(module):
        made = module._replicate_for_data_parallel()
        made._parameters = dict(module._parameters)
        made._modules = {name: child and replica(child) for name, child in module._modules.items()}
        return made

    model = sparse("llama").train()
    expected = model(TOKENS, labels=TOKENS, output_router_logits=True)
    sd.auxiliary_loss(model)
    model(TOKENS[:1])
    output = replica(model)(TOKENS, labels=TOKENS, output_router_logits=True)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.aux_loss, expected.aux_loss)
    assert all(len(layer.assigned) == TOKENS[:1].numel() for _, layer in sd.moe_layers(model))
