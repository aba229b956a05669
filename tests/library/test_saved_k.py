"""k of every layer is saved and restored in every format; states and configurations without it load as before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import smoe_dropout as sd
from smoe_dropout.control import conversions
from smoe_dropout.layer import STATE_OF_K
from tests.library.test_hosts import logits, made

KS = (1, 3, 2)
CONFIG = sd.SMoEConfig(4, 4, router="learned", expert_init="split")


def fresh(config: sd.SMoEConfig = CONFIG) -> nn.Module:
    return sd.moefy(made("gpt2"), config).eval()


def ks(model: nn.Module) -> tuple[int, ...]:
    return tuple(layer.default_k for _, layer in sd.moe_layers(model))


def without_k(state: dict) -> dict:
    return {name: value for name, value in state.items() if STATE_OF_K not in name}


def by_state(model: nn.Module, change=lambda state: state) -> nn.Module:
    loaded = fresh()
    assert str(loaded.load_state_dict(change(model.state_dict()))) == "<All keys matched successfully>"
    return loaded


def by_torch(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model.state_dict(), folder / "state.pt")
    return by_state(model, lambda _: torch.load(folder / "state.pt", weights_only=True))


def by_safetensors(model: nn.Module, folder: Path) -> nn.Module:
    loaded = fresh()
    save_model(model, folder / "state.safetensors")
    assert load_model(loaded, folder / "state.safetensors") == (set(), [])
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def by_distributed_checkpoint(model: nn.Module, folder: Path) -> nn.Module:
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder, no_dist=True)
    state = get_model_state_dict(loaded := fresh())
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(loaded, state)
    return loaded


def by_save_model(model: nn.Module, folder: Path) -> nn.Module:
    sd.save_model(model, folder)
    assert not any(STATE_OF_K in name for name in load_file(folder / "model.safetensors"))
    return sd.load_weights(fresh(), folder)


def by_save_pretrained(model: nn.Module, folder: Path) -> nn.Module:
    sd.save_pretrained(model, folder)
    assert not any(STATE_OF_K in name for name in load_file(folder / "model.safetensors"))
    return sd.from_pretrained(folder)


def by_auto_class(model: nn.Module, folder: Path) -> nn.Module:
    """The Trainer passes the state; tools for checkpoints write it all into the folder's file."""
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(folder, state_dict=model.state_dict())
    assert not any(STATE_OF_K in name for name in load_file(folder / "model.safetensors"))
    save_model(model, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def by_accelerate(model: nn.Module, folder: Path) -> nn.Module:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    loaded = accelerator.prepare(model)
    accelerator.save_state(str(folder))
    sd.set_top_k(loaded, 4)
    accelerator.load_state(str(folder))
    return loaded


WAYS = {
    "state": lambda model, folder: by_state(model),
    "state in bf16": lambda model, folder: by_state(model, lambda state: {name: value.bfloat16() for name, value in state.items()}),
    "mean of states": lambda model, folder: by_state(model, lambda state: {name: (value + value) / 2 for name, value in state.items()}),
    "averaged model": lambda model, folder: by_state(AveragedModel(model).module),
    "torch.save": by_torch,
    "safetensors": by_safetensors,
    "distributed checkpoint": by_distributed_checkpoint,
    "save_model": by_save_model,
    "save_pretrained": by_save_pretrained,
    "auto class": by_auto_class,
    "accelerate": by_accelerate,
    "configuration": lambda model, folder: fresh(*conversions(model)),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", WAYS)
def test_k_of_every_layer_is_restored(way, tmp_path):
    model = fresh()
    sd.set_top_k(model, list(KS))
    expected = logits(model)
    loaded = WAYS[way](model, tmp_path)
    assert ks(loaded) == KS and ("bf16" in way or way == "configuration" or torch.equal(logits(loaded), expected))


def test_states_of_older_versions_load_strictly():
    loaded = fresh(replace(CONFIG, top_k=2))
    assert not any(loaded.load_state_dict(without_k(fresh().state_dict()))) and ks(loaded) == (2, 2, 2)


@pytest.mark.parametrize("value", [torch.tensor(5), torch.tensor(0), torch.tensor(2.5), torch.tensor([1, 2]), "2"], ids=str)
def test_state_with_another_k_is_refused(value):
    name = f"transformer.h.1.mlp.0.{STATE_OF_K}"
    with pytest.raises(RuntimeError, match=rf"{name}: k = .* must be a whole number from 1 to the 4 experts"):
        (model := fresh()).load_state_dict(model.state_dict() | {name: value})
    assert ks(model)[1] == 4


def test_state_of_a_model_with_more_experts_is_refused_with_the_shapes():
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch for .*router.weight.*_extra_state: k = 4 must be .* the 2 experts"):
        fresh(replace(CONFIG, num_experts=2, top_k=2)).load_state_dict(fresh().state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k_by_layer": ()}, "must be a list of whole numbers"),
        ({"top_k_by_layer": (4, 0)}, "must be a list of whole numbers"),
        ({"top_k_by_layer": 4}, "must be a list of whole numbers"),
        ({"top_k_by_layer": (1, 3)}, "top_k = 4 must be the largest"),
        ({"top_k_by_layer": (4, 3), "layers": (1,)}, "a number for each of the 1 layers"),
        ({"top_k_by_layer": (2, 4), "experts_by_layer": (4, 3), "expert_init": "fresh", "d_expert": 2}, "at most its number of experts"),
        ({"top_k_by_layer": (2, 4)}, "a number for each of the 3 MoE layers"),
    ],
)
def test_invalid_k_by_layer_is_refused(settings, message):
    with pytest.raises(sd.ConfigError, match=message):
        fresh(replace(CONFIG, **settings))


def test_configurations_follow_k():
    model = fresh()
    assert conversions(model) == [CONFIG]
    sd.set_top_k(model, {"transformer.h.1.mlp.0": 2})
    assert conversions(model) == [replace(CONFIG, top_k_by_layer=(4, 2, 4))]
    described = model.config.smoe_dropout
    assert (described["top_k"], described["top_k_by_layer"]) == (4, (4, 2, 4))
    part = model.transformer.h[1]
    sd.set_top_k(part, 1)  # does not know of the others
    assert conversions(part) == [replace(CONFIG, top_k=1)] and conversions(model)[0].top_k_by_layer == (4, 1, 4)
    with sd.top_k(model, 3):
        assert conversions(model)[0].top_k_by_layer == (4, 1, 4)
    sd.set_top_k(model, 2)
    assert conversions(model) == [replace(CONFIG, top_k=2)] and (described["top_k"], described["top_k_by_layer"]) == (2, None)


def test_two_conversions_keep_their_k(tmp_path):
    model = made("gpt2")
    for layers in ((0, 2), (1,)):
        sd.moefy(model, replace(CONFIG, layers=layers))
    sd.set_top_k(model.eval(), [1, 2, 3])
    assert [(config.top_k, config.top_k_by_layer) for config in conversions(model)] == [(3, (1, 3)), (2, None)]
    assert ks(by_save_pretrained(model, tmp_path)) == (1, 2, 3)


def test_folder_with_k_of_other_layers_is_refused(tmp_path):
    sd.save_model(fresh(), tmp_path, manifest=False)
    stored = json.loads((tmp_path / "smoe_config.json").read_text())
    (tmp_path / "smoe_config.json").write_text(json.dumps(stored | {"top_k_by_layer": [4, 2]}))
    with pytest.raises(sd.ConfigError, match=r"top_k_by_layer = \(4, 2\), but the model has 3 MoE layers"):
        sd.load_weights(fresh(), tmp_path)


def test_surgery_keeps_k_by_layer(tmp_path):
    model = fresh()
    sd.set_top_k(model, list(KS))
    calibration = sd.calibrate(model, [(lambda: logits(model), None)])
    calibration.save(tmp_path / "calibration")
    assert list(sd.Calibration.load(tmp_path / "calibration").k.values()) == list(KS)
    smaller, config = sd.operate(model, "keep_best", 2, None, score="router_norm")
    assert ks(smaller) == config.top_k_by_layer == (1, 2, 2) and ks(sd.compress(model, 2)) == KS
    assert ks(by_save_pretrained(smaller, tmp_path)) == (1, 2, 2)
