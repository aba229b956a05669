"""Folders of transformers models with experts load bit for bit or are rejected."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smoe_dropout as sd
from smoe_dropout import registry
from smoe_dropout.hf.described import CODE
from smoe_dropout.hf.folder import CONFIG, GENERATION, INDEX, OLD_WEIGHTS, WEIGHTS
from smoe_dropout.manifest import MANIFEST
from tests import tiny
from tests.library.test_hosts import CAUSAL, HOSTS, TOKENS, logits, made

transformers = pytest.importorskip("transformers")

SMOE = {"num_experts": 4, "top_k": 2}
DOWN = "bert.encoder.layer.1.intermediate.experts.down"


def sparse(host="bert", **settings) -> nn.Module:
    return sd.moefy(made(host), sd.SMoEConfig(**{**SMOE, **settings}))


def as_trainer_saves(model: nn.Module, folder) -> None:
    model.save_pretrained(folder)


def in_shards(model: nn.Module, folder) -> None:
    sd.save_pretrained(model, folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2


def same(model: nn.Module, other: nn.Module) -> bool:
    """Return whether two models are bit-identical, including precision and frozen parameters."""
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        p.dtype == theirs[n].dtype and torch.equal(p, theirs[n]) and p.requires_grad == theirs[n].requires_grad for n, p in ours.items()
    )


@pytest.mark.parametrize("save", [sd.save_pretrained, as_trainer_saves, in_shards])
@pytest.mark.parametrize("host", HOSTS)
def test_round_trip(host, save, tmp_path):
    """Restores weights, k, tied weights and the experts' configuration, without using the global generator."""
    settings = {"router": "learned", "expert_init": "split", "layers": (0, 2), "balance_loss": 0.5, "gate_weight": "uniform"}
    model = sparse(host, **settings)
    sd.set_top_k(model, 3)
    with sd.top_k(model, 1):
        pass
    save(model, tmp_path)
    before = torch.get_rng_state()
    loaded = sd.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and type(loaded) is type(model) and not loaded.training
    assert same(loaded, model) and torch.equal(logits(loaded), logits(model)) and sd.get_top_k(loaded) == 3
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (host != "llama")
    assert sd.moe_layers(loaded)[1][1].config == sd.SMoEConfig(**{**SMOE, **settings, "top_k": 3})
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    with torch.no_grad():
        loaded.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.any()


def save_logits(folder: Path, names: list[str]) -> None:
    save_file({name: logits(sd.from_pretrained(folder / name)) for name in names}, folder / "logits")


def save_peak(folder: Path) -> None:
    """Memory in bytes by which loading exceeds what the process has before; the first time pays for imports."""
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak()
        model = sd.from_pretrained(folder / "saved")
        found = peak() - before
        del model
    (folder / "peak").write_text(str(found))


def peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of memory")
def test_loading_needs_no_memory_for_random_weights(tmp_path):
    """Weights are mapped from the file, as by transformers, and experts moved once, to a cache line; random weights would show."""
    sizes = {"vocab_size": 31, "n_embd": 512, "n_layer": 3, "n_head": 2, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 0}
    model = sd.moefy(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), sd.SMoEConfig.exact(4))
    sd.save_pretrained(model, tmp_path / "saved")
    tiny.call(save_peak, tmp_path)
    stored = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert stored > 36e6 and int((tmp_path / "peak").read_text()) < 1.6 * stored


def test_another_process_computes_the_same(tmp_path):
    models = {host: sparse(host, expert_init="split") for host in HOSTS}
    for host, model in models.items():
        sd.save_pretrained(model, tmp_path / host)
    tiny.call(save_logits, tmp_path, list(models))
    computed = load_file(tmp_path / "logits")
    assert all(torch.equal(computed[host], logits(model)) for host, model in models.items())


@pytest.mark.parametrize("save", [sd.save_pretrained, as_trainer_saves])
@pytest.mark.parametrize("when", ["before", "after"])
def test_bfloat16_is_kept(when, save, tmp_path):
    """Converted before moefy, the router stays float32; converted after it, everything is bfloat16."""
    model = sd.moefy(made("bert").bfloat16(), sd.SMoEConfig(**SMOE)) if when == "before" else sparse().bfloat16()
    save(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    assert (
        same(loaded, model)
        and torch.equal(logits(loaded), logits(model))
        and sd.moe_layers(loaded)[0][1].experts.up.dtype == torch.bfloat16
    )


def test_a_router_that_needs_tokens_and_a_generation_config(tmp_path):
    model = sparse("gpt2", router="hash")
    model.generation_config.max_new_tokens = 3
    sd.save_pretrained(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.generate(TOKENS[:1], do_sample=False, pad_token_id=0).shape == (1, 12)


@pytest.mark.parametrize("method", ["similarity", "attention"])
def test_methods_that_need_attention_probabilities(method, tmp_path):
    """config.json does not store the attention implementation."""
    model = made("bert")
    model.set_attn_implementation("eager")
    sd.moefy(model, sd.SMoEConfig(**SMOE, router="learned", method=method))
    sd.save_pretrained(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    loaded.set_attn_implementation("eager")  # as in the original model
    assert same(loaded, model) and torch.equal(logits(loaded), logits(model))


def test_saving_again(tmp_path):
    """Overwrites an earlier save, complete or not, and keeps other files in the folder."""
    (tmp_path / "notes.txt").write_text("mine")
    sd.save_pretrained(sparse("gpt2"), tmp_path)
    model = sparse()
    sd.save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, f"{CODE}.py", WEIGHTS, MANIFEST, "notes.txt"}
    assert same(sd.from_pretrained(tmp_path), model)


def test_saving_over_an_older_version(tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "saved-0.1" / "bert", tmp_path / "saved")
    sd.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    model = sd.from_pretrained(tmp_path / "saved")
    assert same(sd.from_pretrained(tmp_path / "again"), model)
    sd.save_pretrained(model, tmp_path / "saved")
    assert same(sd.from_pretrained(tmp_path / "saved"), model) and not (tmp_path / "saved" / OLD_WEIGHTS).exists()


@pytest.mark.parametrize("name", ["os.fsync", "sha256", "os.replace"])
@pytest.mark.parametrize("older", [False, True])
def test_interrupted_save_is_rejected_or_not_started(name, older, tmp_path, monkeypatch):
    """And can be repeated."""
    module, model, calls = sys.modules["smoe_dropout.manifest"], sparse(), []
    if older:
        sd.save_pretrained(model, tmp_path)
    place = module.os if "." in name else module
    real = getattr(place, name.removeprefix("os."))

    def stops(*arguments):
        calls.append(arguments)
        if name != "os.replace" or len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(place, name.removeprefix("os."), stops)
    with pytest.raises(KeyboardInterrupt):
        sd.save_pretrained(sparse(router="learned"), tmp_path)
    monkeypatch.undo()
    if older and name != "os.replace":
        assert same(sd.from_pretrained(tmp_path), model)
    else:
        with pytest.raises(sd.ConfigError, match="interrupted"):
            sd.from_pretrained(tmp_path)
    sd.save_pretrained(model, tmp_path)
    assert same(sd.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", [CONFIG, GENERATION, WEIGHTS, OLD_WEIGHTS, "model-00001-of-00002.safetensors", INDEX, MANIFEST])
def test_folder_of_another_model_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(sd.ConfigError, match=f"holds {re.escape(name)} of another model"):
        sd.save_pretrained(sparse(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: made("bert"), "was not converted by moefy: use its own model.save_pretrained"),
        (lambda: nn.Linear(2, 2), "use smoe_dropout.save_model"),
        (lambda: sd.moefy(nn.Sequential(made("bert")), sd.SMoEConfig(**SMOE)), "use smoe_dropout.save_model"),
    ],
)
def test_models_that_cannot_be_saved(build, words, tmp_path):
    with pytest.raises(sd.ConfigError, match=words):
        sd.save_pretrained(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def rewrite(folder, name, change):
    """Apply `change(values)` to a JSON file."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def flip(folder, name):
    """Flip one bit of the last byte."""
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def split(folder) -> Path:
    """Save the weights of a folder again, in two files; returns the second."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in (0, 1)}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file, {"format": "pt"})
    places = {name: file for file, inside in parts.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / list(parts)[1]


def edit(folder, change):
    """Apply `change(tensors)` to a folder written by transformers."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


OURS = {
    "weights_bit": (lambda f: flip(f, WEIGHTS), WEIGHTS, "damaged"),
    "config_changed": (lambda f: rewrite(f, CONFIG, lambda c: c["smoe_dropout"].update(top_k=1)), CONFIG, "damaged or modified"),
    "generation_changed": (lambda f: rewrite(f, GENERATION, lambda c: c.update(max_length=3)), GENERATION, "modified"),
    "weights_missing": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "is missing"),
    "config_missing": (lambda f: (f / CONFIG).unlink(), CONFIG, "is missing"),
    "nothing": (lambda f: [(f / name).unlink() for name in (MANIFEST, WEIGHTS)], "", "neither manifest.json nor model.safetensors"),
    "manifest_garbage": (lambda f: (f / MANIFEST).write_text("{"), MANIFEST, "not readable as JSON"),
    "manifest_of_nothing": (
        lambda f: rewrite(f, MANIFEST, lambda m: (m["sha256"].pop(WEIGHTS), m.pop("checksum"))),  # as an older version wrote it
        MANIFEST,
        "not describe a complete save",
    ),
    "manifest_list": (lambda f: (f / MANIFEST).write_text("[]"), MANIFEST, "not a JSON object"),
    "other_weights_beside": (lambda f: (f / INDEX).write_bytes(b""), INDEX, "is not part of the save"),
    "truncated": (lambda f: truncate(f / WEIGHTS), WEIGHTS, "damaged"),
    "no_folder": (lambda f: f.rename(f.parent / "gone"), "", "is not a folder"),
}


@pytest.mark.parametrize(("damage", "file", "words"), OURS.values(), ids=OURS)
def test_modified_folders_are_rejected(damage, file, words, tmp_path):
    folder = tmp_path / "saved"
    sd.save_pretrained(sparse("gpt2"), folder)
    damage(folder)
    with pytest.raises(sd.ConfigError, match=re.escape(words)) as error:
        sd.from_pretrained(folder)
    assert str(folder / file) in str(error.value)


def host(**values):
    return lambda f: rewrite(f, CONFIG, lambda c: c["host"].update(values))


def experts(**values):
    return lambda f: rewrite(f, CONFIG, lambda c: c["smoe_dropout"].update(values))


def top(**values):
    return lambda f: rewrite(f, CONFIG, lambda c: c.update(values))


TYING = "cls.predictions.decoder.weight"
THEIRS = {
    "missing": (lambda f: edit(f, lambda t: t.pop(DOWN)), f"missing ['{DOWN}']"),
    "foreign": (lambda f: edit(f, lambda t: t.update(extra=torch.zeros(1))), "unexpected ['extra']"),
    "misshapen": (lambda f: edit(f, lambda t: t.update({DOWN: t[DOWN].mT.contiguous()})), f"{DOWN} has shape (4, 16, 8)"),
    "truncated": (lambda f: truncate(f / WEIGHTS), "cannot be read"),
    "index": (lambda f: (f / WEIGHTS).rename(f / INDEX), "not readable as JSON"),
    "shard_missing": (lambda f: split(f).unlink(), "model-00002-of-00002.safetensors is missing"),
    "shard_truncated": (lambda f: truncate(split(f)), "model-00002-of-00002.safetensors cannot be read"),
    "num_experts": (experts(num_experts=2), "the model expects ("),
    "fewer_layers": (experts(layers=[0]), "missing ["),
    "impossible": (experts(top_k=99), "top_k = 99"),
    "later_version": (experts(novelty=1), "novelty"),
    "no_experts": (lambda f: rewrite(f, CONFIG, lambda c: c.pop("smoe_dropout")), "is damaged"),
    "garbage": (lambda f: (f / CONFIG).write_text("{"), "is not readable as JSON"),
    "layers": (host(num_hidden_layers=2), "unexpected ["),
    "width": (host(intermediate_size=64), "has shape"),
    "host_garbage": (host(hidden_size="wide"), "does not describe a valid model: Validation error for field 'hidden_size'"),
    "no_host": (lambda f: rewrite(f, CONFIG, lambda c: c.pop("host")), "is damaged: host is missing"),
    "host": (top(host_model_type="unheard"), "a 'unheard' model, which transformers does not know"),
    "architecture": (top(architectures=["Unheard"]), "'Unheard' is not a model of transformers"),
    "no_architecture": (top(architectures=None), "model_class=..."),
    "not_a_model": (top(architectures=["BertConfig"]), "is not a model of transformers"),
    "other_class": (top(architectures=["GPT2LMHeadModel"]), "has a 'bert' model, but GPT2LMHeadModel is not one"),
    "head": (top(architectures=["BertForSequenceClassification"]), "missing ["),
}


@pytest.mark.parametrize(("damage", "words"), THEIRS.values(), ids=THEIRS)
def test_folders_that_do_not_match_are_rejected(damage, words, tmp_path):
    sparse().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(sd.ConfigError, match=re.escape(words)) as error:
        sd.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_dense_folder_and_unknown_names(tmp_path, monkeypatch):
    made("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(sd.ConfigError, match="describes a 'bert' model without experts"):
        sd.from_pretrained(tmp_path / "dense")
    monkeypatch.setitem(registry.ROUTERS, "mine", registry.ROUTERS["learned"])
    sd.save_pretrained(sparse(router="mine"), tmp_path / "mine")
    monkeypatch.undo()
    with pytest.raises(sd.ConfigError, match=r"router 'mine', which is not registered.*ROUTERS\['mine'\] = 'module:Class'"):
        sd.from_pretrained(tmp_path / "mine")


def test_tied_tensor_stored_under_another_name(tmp_path):
    model = sparse()
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({TYING: t.pop("bert.embeddings.word_embeddings.weight")}))
    assert same(sd.from_pretrained(tmp_path), model)


class Own(transformers.BertForMaskedLM):
    """A model class that is not part of transformers."""


def test_user_defined_model_class(tmp_path):
    model = sd.moefy(Own(made("bert").config), sd.SMoEConfig(**SMOE)).eval()
    sd.save_pretrained(model, tmp_path)
    with pytest.raises(sd.ConfigError, match="'Own' is not a model of transformers"):
        sd.from_pretrained(tmp_path)
    loaded = sd.from_pretrained(tmp_path, model_class=Own)
    assert type(loaded) is Own and same(loaded, model)


@pytest.mark.parametrize("save", [sd.save_pretrained, as_trainer_saves])
@pytest.mark.parametrize("host", HOSTS)
def test_classes_of_transformers_keep_the_experts(host, save, tmp_path):
    """They load a folder with its experts, and do not build a dense model from the configuration."""
    model = sparse(host)
    save(model, tmp_path)
    assert same(type(model).from_pretrained(tmp_path), model)
    for kind in (type(model), type(model.base_model)):
        with pytest.raises(sd.ConfigError, match=r"describes a model with experts, and \w+ would be dense"):
            kind(model.config)


@pytest.mark.parametrize("host", HOSTS)
def test_users_configuration_is_not_changed(host, tmp_path):
    """All parts of a model share the configuration with the experts, so a part saved on its own describes them too."""
    dense = made(host)
    config, before = dense.config, dense.config.to_dict()
    model = sd.moefy(dense, sd.SMoEConfig(**SMOE))
    assert config.to_dict() == before and type(config) is not type(model.config) and isinstance(model.config, type(config))
    assert model.config.model_type == config.model_type and not [m for m in model.modules() if getattr(m, "config", None) is config]
    model.base_model.save_pretrained(tmp_path)
    if host in CAUSAL:  # the base models of the others lack the pooler of their class
        assert same(sd.from_pretrained(tmp_path), model.base_model)
