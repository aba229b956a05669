"""Experts in 8 bits."""

import pytest
import torch

import smoe_dropout as sd
from smoe_dropout.experts import Experts
from smoe_dropout.experts.int8 import Int8Experts
from tests.library.test_inference import language_model, with_experts

E, D, H = 4, 12, 10


def pair(activation: str = "relu", dtype: torch.dtype = torch.float32) -> tuple[Experts, Int8Experts]:
    """Experts whose maps are rounded to 8 bits, and the same stored so."""
    torch.manual_seed(0)
    experts = Experts(E, D, H, activation, 0.0, "reference", 0.5).eval().requires_grad_(False)
    for bias in (experts.bias_up, experts.bias_down):
        bias.normal_()
    int8 = Int8Experts(experts.to(dtype))
    experts.up.copy_(int8.up), experts.down.copy_(int8.down)
    return experts, int8


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 4), (3, 2), (40, 3), (0, 2)])  # by rows, and converted first
@pytest.mark.parametrize("activation", ["relu", "silu_gated"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_they_compute_what_experts_with_rounded_maps_compute(dtype, tolerance, activation, tokens, k, ragged):
    experts, int8 = pair(activation, dtype)
    x, weights = torch.randn(tokens, D).to(dtype), torch.rand(tokens, k)
    indices = torch.rand(tokens, E).argsort(1)[:, :k]
    if ragged:
        absent = torch.arange(k) > torch.arange(tokens)[:, None] % k
        indices, weights = indices.masked_fill(absent, -1), weights.masked_fill(absent, 0.0)
    with torch.no_grad():
        expected, found = (each(x, indices, weights, ragged=ragged) for each in (experts, int8))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_each_weight_is_rounded_to_the_nearest_step_of_its_input():
    experts = Experts(E, D, H, "relu", 0.0, "reference", 0.5)
    with torch.no_grad():
        experts.up[0, :, 3] = 0
    int8 = Int8Experts(experts)
    for name, outputs in (("up", 1), ("down", 2)):
        before, after = getattr(experts, name).detach(), getattr(int8, name)
        step = before.abs().amax(outputs, keepdim=True) / 127
        assert ((after - before).abs() <= step * 0.5001).all() and not torch.equal(after, before)


def test_slim_makes_them_and_they_are_saved_and_have_no_gradients(tmp_path):
    model, tokens = with_experts(), torch.randint(256, (2, 8))
    slimmed = sd.slim(model, 2, torch.int8)
    sd.save_model(slimmed, tmp_path)
    restored = sd.load_weights(sd.slim(with_experts(), 2, torch.int8), tmp_path)
    with torch.no_grad(), sd.top_k(model.eval(), 2):
        found, expected = slimmed.logits(tokens)[0], model.logits(tokens)[0]
        assert torch.equal(restored.logits(tokens)[0], found) and not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
    with pytest.raises(sd.ConfigError, match="int8 experts are for inference and have no gradients"):
        slimmed.train().logits(tokens)
    with pytest.raises(sd.ConfigError, match=r"belongs to another model: missing .*experts.down"):
        sd.load_weights(with_experts(), tmp_path)


def test_save_pretrained_refuses_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = sd.moefy(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), sd.SMoEConfig(2, 1))
    with pytest.raises(sd.ConfigError, match="save the model from which slim made them"):
        sd.save_pretrained(sd.slim(model, 1, torch.int8), tmp_path / "saved")


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_generation_by_rows_equals_segments(lanes):
    """One position at a time takes sums over rows and no mask; whole segments take matrix products."""
    model, tokens = sd.moefy(language_model(), sd.SMoEConfig(4, 2, init_std=0.3)).eval(), torch.randint(256, (lanes, 8))
    with torch.no_grad():
        whole, cache = model.read(tokens)[0], None
        for position in range(tokens.shape[1]):
            logits, cache = model.read(tokens[:, position : position + 1], cache)
            torch.testing.assert_close(logits[:, 0], whole[:, position], atol=1e-5, rtol=1e-5)
