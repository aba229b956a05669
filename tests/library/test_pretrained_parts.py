"""Models of which a part was converted, that were changed by hand, whose tensors are renamed or distributed: saved so that they load."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.manifest import MANIFEST
from tests import tiny
from tests.library.test_hosts import logits, made
from tests.library.test_pretrained import SMOE, as_trainer_saves, in_shards, same, sparse

transformers = pytest.importorskip("transformers")


def converted_part(model: nn.Module) -> None:
    sd.moefy(model.base_model, sd.SMoEConfig(**SMOE))


def converted_layers(model: nn.Module) -> None:
    sd.moefy(model.transformer.h, sd.SMoEConfig(**SMOE, layers=(1,)))


def converted_part_by_name(model: nn.Module) -> None:
    sd.moefy(model.transformer, sd.SMoEConfig(**SMOE, sites="h.?.mlp", layers=(0, 2)))


def converted_around(model: nn.Module) -> None:
    sd.moefy(nn.ModuleDict({"part": model}), sd.SMoEConfig(**SMOE, sites="part.*.mlp", layers=(0, 2)))


def converted_twice(model: nn.Module) -> None:
    sd.moefy(model, sd.SMoEConfig(8, 3, layers=(1,)))
    sd.moefy(model.transformer, sd.SMoEConfig(**SMOE, layers=(0,), router="learned"))


@pytest.mark.parametrize("save", [sd.save_pretrained, as_trainer_saves])
@pytest.mark.parametrize("convert", [converted_part, converted_layers, converted_part_by_name, converted_around, converted_twice])
def test_conversion_of_a_part_or_of_what_is_around(convert, save, tmp_path):
    """The whole is saved with what loads the same MoE layers, and the current k of each."""
    model = made("gpt2")
    convert(model)
    sd.set_top_k(model, 1)
    save(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    assert same(loaded, model) and torch.equal(logits(loaded), logits(model)) and sd.get_top_k(loaded) == 1
    assert not any(parameter.data_ptr() % 64 for _, layer in sd.moe_layers(loaded) for parameter in layer.experts.parameters())
    for again in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        save(again, tmp_path)
        assert same(sd.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("save", [sd.save_pretrained, as_trainer_saves])
def test_model_that_its_class_does_not_build(save, tmp_path):
    """It could not be loaded, so it is not saved; one whose class needs more than a configuration is saved with a warning."""
    model = made("gpt2")
    model.transformer.h[1].mlp = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
    sd.moefy(model, sd.SMoEConfig(**SMOE))
    with pytest.raises(sd.ConfigError, match=r"has other MoE layers \(transformer\.h\.1\..*use smoe_dropout.save_model"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    needy = sd.moefy(Needy(made("gpt2").config, 3), sd.SMoEConfig(**SMOE))
    with pytest.warns(UserWarning, match=r"whether it can be loaded is unknown: .*'number'"):
        save(needy, tmp_path)
    assert same(sd.from_pretrained(tmp_path, Needy, number=3), needy)


class Needy(transformers.GPT2LMHeadModel):
    """A model class that needs more than a configuration."""

    def __init__(self, config, number: int):
        super().__init__(config)
        self.number = number


IMAGES = {"image_size": 8, "patch_size": 4}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RENAMED = {  # classes whose tensors have other names in the file
    "vit": ("ViTForImageClassification", "vit.layers.*.mlp", SMALL | IMAGES),
    "dinov2": ("Dinov2Model", "encoder.layer.*.mlp", {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16} | IMAGES),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox.layers.*.mlp", SMALL | {"vocab_size": 50}),
    "beit": ("BeitForImageClassification", "beit.layers.*.mlp", SMALL | IMAGES),
}


@pytest.mark.parametrize("save", [sd.save_pretrained, as_trainer_saves, in_shards])
@pytest.mark.parametrize(("name", "sites", "sizes"), RENAMED.values(), ids=RENAMED)
def test_tensors_renamed_by_transformers(name, sites, sizes, save, tmp_path):
    kind = getattr(transformers, name)
    model = sd.moefy(kind(kind.config_class(**sizes)).eval(), sd.SMoEConfig(**SMOE, sites=sites))
    save(model, tmp_path)
    assert same(sd.from_pretrained(tmp_path), model)


def save_sharded(folder: Path, rank: int) -> None:
    """Process of two over which FSDP2 distributes a model."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = sparse("gpt2", expert_init="split")
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    sd.save_pretrained(model, folder / "saved", max_shard_size="20KB")
    assert (folder / "saved" / MANIFEST).exists()
    distributed.destroy_process_group()


def test_model_sharded_over_two_processes(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: tiny.call(save_sharded, tmp_path, rank), range(2)))
    model, loaded = sparse("gpt2", expert_init="split"), sd.from_pretrained(tmp_path / "saved")
    assert same(loaded, model) and torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
