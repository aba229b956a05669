"""Weights load bit for bit or are rejected; official names and layouts convert both ways."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smoe_dropout as sd
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.io import CONFIG, WEIGHTS, stored_tensors
from smoe_dropout.manifest import MANIFEST
from tests import tiny

SIZES = {"n_token": 11, "n_layer": 2, "n_head": 2, "d_model": 8, "d_head": 4, "d_inner": 16}
SMOE = {"num_experts": 4, "top_k": 2}


def build(seed=0, moe=True, config=None, **sizes) -> MemTransformerLM:
    torch.manual_seed(seed)
    model = MemTransformerLM(TransformerXLConfig(**{**SIZES, **sizes}))
    if moe:
        sd.moefy(model, sd.SMoEConfig(**{**SMOE, **(config or {})}))
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # including biases
    return model


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[name], tensor) for name, tensor in state.items())


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KINDS = {
    "sparse": {},
    "dense": {"moe": False},
    "untied": {"tie_weight": False},
    "some_layers": {"config": {"layers": (1,), "router": "learned"}},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_round_trip(tmp_path, kind):
    model, other = build(0, **kind), build(1, **kind)
    assert not same(other, model.state_dict())
    sd.save_model(model, tmp_path / "deep" / "folder")
    assert sd.load_weights(other, str(tmp_path / "deep" / "folder")) is other
    assert same(other, model.state_dict())
    if kind.get("tie_weight", True):
        assert other.head.weight is other.embedding.weight and "head.weight" not in load_file(tmp_path / "deep" / "folder" / WEIGHTS)
    else:
        assert other.head.weight is not other.embedding.weight


def save_again(folder: Path, again: Path) -> None:
    sd.save_model(sd.load_weights(build(seed=1), folder), again)


def test_round_trip_in_another_process(tmp_path):
    model = build()
    model.embedding.weight.data[0, :4] = torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])
    sd.save_model(model, tmp_path)
    tiny.call(save_again, tmp_path, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == stored_tensors(model).keys()
    for name, tensor in stored_tensors(model).items():
        assert torch.equal(again[name].view(torch.int32), tensor.view(torch.int32)), name
    assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_saving_over_another_model(tmp_path, before, after):
    sd.save_model(build(0, moe=before), tmp_path)
    model = build(1, moe=after)
    sd.save_model(model, tmp_path)
    assert same(sd.load_weights(build(2, moe=after), tmp_path), model.state_dict())


DOWN = "layers.1.feed_forward.core.experts.down"
DAMAGES = {
    "missing": (lambda f: edit_weights(f, lambda t: t.pop(DOWN)), WEIGHTS, DOWN),
    "foreign": (lambda f: edit_weights(f, lambda t: t.update(extra=torch.zeros(1))), WEIGHTS, "extra"),
    "misshapen": (lambda f: edit_weights(f, lambda t: t.update({DOWN: t[DOWN].transpose(1, 2).contiguous()})), WEIGHTS, DOWN),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), WEIGHTS, "cannot be read"),
    "truncated_header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:20]), WEIGHTS, "cannot be read"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS, "cannot be read"),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "cannot be read"),
    "no_config": (lambda f: (f / CONFIG).unlink(), "", "dense"),
    "truncated_config": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:30]), CONFIG, CONFIG),
    "config_of_a_later_version": (lambda f: edit_config(f, novelty=1), CONFIG, "novelty"),
    "impossible_config": (lambda f: edit_config(f, top_k=99), CONFIG, "top_k = 99"),
    "num_experts": (lambda f: edit_config(f, num_experts=8), CONFIG, "num_experts = 8, but the model has 4"),
    "router": (lambda f: edit_config(f, router="learned"), CONFIG, "router = 'learned'"),
    "gate_weight": (lambda f: edit_config(f, gate_weight="uniform"), CONFIG, "gate_weight = 'uniform'"),
    "output_scale": (lambda f: edit_config(f, output_scale="dense"), CONFIG, "output_scale = 'dense'"),
}


@pytest.mark.parametrize(("damage", "file", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_rejected_and_the_model_is_unchanged(tmp_path, damage, file, words):
    """With a manifest, and as version 0.1 wrote them, by what they hold."""
    sd.save_model(build(0), tmp_path)
    damage(tmp_path)
    model = build(1)
    before = snapshot(model)
    with pytest.raises(sd.ConfigError, match=r"is missing, which manifest\.json lists|differs from manifest\.json"):
        sd.load_weights(model, tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(sd.ConfigError, match=re.escape(words)) as error:
        sd.load_weights(model, tmp_path)
    assert str(tmp_path / file) in str(error.value)
    assert same(model, before)


@pytest.mark.parametrize(
    ("stored", "ours", "words"),
    [
        ({}, {"moe": False}, "holds a sparse model, but this one is dense"),
        ({"moe": False}, {}, "holds a dense model, but this one is sparse"),
        ({}, {"tie_weight": False}, "missing ['head.weight']"),
        ({"tie_weight": False}, {}, "unexpected ['head.weight']"),
        ({}, {"n_layer": 3}, "missing ['layers.2."),
        ({}, {"d_inner": 32}, "the model expects shape (4, 8"),
        ({"moe": False}, {"moe": False, "n_token": 12}, "embedding.weight has shape (11, 8)"),
    ],
)
def test_folders_of_other_models_are_rejected(tmp_path, stored, ours, words):
    sd.save_model(build(0, **stored), tmp_path)
    model = build(1, **ours)
    before = snapshot(model)
    with pytest.raises(sd.ConfigError, match=re.escape(words)) as error:
        sd.load_weights(model, tmp_path)
    assert str(tmp_path) in str(error.value) and same(model, before)


@pytest.mark.parametrize("change", [{"top_k": 4}, {"backend": "reference"}, {"init_std": 0.1}], ids=str)
def test_settings_that_may_differ(tmp_path, change):
    model = build(0)
    sd.save_model(model, tmp_path)
    assert same(sd.load_weights(build(1, config=change), tmp_path), model.state_dict())


# official names


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_official_names_convert_both_ways(kind):
    tensors = stored_tensors(build(0, n_layer=12, **{**kind, **({"config": {"layers": (3, 11)}} if "config" in kind else {})}))
    official = sd.to_official(tensors)
    assert len(official) == len(tensors) and not set(official) & set(tensors)
    back = sd.from_official(official)
    assert list(back) == list(tensors) and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    again = sd.to_official(back)
    assert again.keys() == official.keys() and all(torch.equal(again[name], tensor) for name, tensor in official.items())


def test_official_layout_of_experts():
    """fmoe's FMoELinear stores [expert, out, in]: the first map as ours, the second transposed."""
    experts = build().eval().layers[1].feed_forward.core.experts
    official = sd.to_official(stored_tensors(build()))
    x = torch.randn(8)
    up, down = official["layers.1.pos_ff.experts.htoh4.weight"], official["layers.1.pos_ff.experts.h4toh.weight"]
    assert up.shape == (4, 4, 8) and down.shape == (4, 8, 4) and down.is_contiguous()
    hidden = (up[2] @ x + official["layers.1.pos_ff.experts.htoh4.bias"][2]).relu()
    expected = down[2] @ hidden + official["layers.1.pos_ff.experts.h4toh.bias"][2]
    torch.testing.assert_close(experts(x[None], torch.tensor([[2]]), torch.ones(1, 1))[0], expected)


@pytest.mark.parametrize("translate", [sd.from_official, sd.to_official])
@pytest.mark.parametrize(
    "name", ["layers.0.pos_ff.nothing", "word_emb", "module.layers.0.attention.qkv.weight", "layers.x.attention.qkv.weight"]
)
def test_unknown_names_are_rejected(translate, name):
    with pytest.raises(sd.ConfigError, match=re.escape(repr(name))):
        translate({name: torch.zeros(1)})


def test_weights_of_another_method_are_rejected(tmp_path):
    """Although they have the same names and shapes."""
    from tests.library.test_moefy import transformer_xl

    sd.save_model(sd.moefy(transformer_xl(), sd.SMoEConfig(4, 2, router="learned", method="momentumsmoe")), tmp_path)
    with pytest.raises(sd.ConfigError, match="method = 'momentumsmoe', but the model has None"):
        sd.load_weights(sd.moefy(transformer_xl(), sd.SMoEConfig(4, 2, router="learned")), tmp_path)
