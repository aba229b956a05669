"""Folders from elsewhere: none makes transformers run code, read other files than its own, or load other weights without a word."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import smoe_dropout as sd
from smoe_dropout.files import DEEPEST
from smoe_dropout.hf.folder import CONFIG, INDEX, WEIGHTS
from smoe_dropout.manifest import MANIFEST
from tests.library.test_pretrained import host, in_shards, rewrite, same, sparse, top

transformers = pytest.importorskip("transformers")

KERNEL = "org/kernel"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders as transformers writes them, in one file and in shards, and their model."""
    model, folder = sparse("gpt2"), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "whole")
    in_shards(model, folder / "shards")
    (folder / "shards" / MANIFEST).unlink()
    return model, folder


def written(text: str | bytes, name: str = CONFIG):
    return lambda f: (f / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def beside(name: str, content: str = "{}"):
    return lambda f: (f / name).write_text(content)


def index(**values):
    return lambda f: rewrite(f, INDEX, lambda i: i.update(values))


DEEP = "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2)
FOREIGN = {
    "attention": (host(_attn_implementation=KERNEL), "host._attn_implementation = 'org/kernel' is not an attention of transformers"),
    "attention_argument": (host(attn_implementation=f"{KERNEL}@main:f"), "is not an attention of transformers"),
    "attention_internal": (host(_attn_implementation_internal=KERNEL), "is not an attention of transformers"),
    "attention_by_part": (host(attn_implementation={"": "sdpa", "text": KERNEL}), "is not an attention of transformers"),
    "attention_of_a_part": (host(text_config={"parts": [{"_attn_implementation": KERNEL}]}), "host.text_config.parts.0._attn"),
    "attention_wrapped": (host(_attn_implementation=f"paged|{KERNEL}"), "is not an attention of transformers"),
    "attention_number": (host(_attn_implementation=3), "is not an attention of transformers"),
    "other_weights": (host(transformers_weights="../other.safetensors"), "names other weights than those of the folder"),
    "quantised": (host(quantization_config={"quant_method": "gptq"}), "would quantise the attention"),
    "quantised_part": (host(text_config={"quantization_config": {}}), "experts are not quantised"),
    "backbone": (host(backbone="org/model"), "names a model elsewhere"),
    "nan": (
        lambda f: written((f / CONFIG).read_text().replace('"host": {', '"host": {"dropout": NaN,'))(f),
        "host.dropout is not a number",
    ),
    "deep": (host(deep=json.loads(DEEP)), "is nested deeper"),
    "huge_number": (host(vocab_size=10**400), "cannot be built"),
    "huge_size": (host(n_positions=2**60, n_ctx=2**60, n_embd=2**60), "cannot be built"),
    "architectures": (top(architectures={"a": 1}), "is damaged: architectures"),
    "adapter": (beside("adapter_config.json", '{"base_model_name_or_path": "/elsewhere"}'), "changes the weights of the model"),
    "distributed": (beside("shard-00001-model-00001-of-00001.safetensors"), "changes the weights of the model"),
    "manifest_path": (beside(MANIFEST, json.dumps({"complete": True, "sha256": {"../x": "0" * 64}})), "is not the name of a file"),
    "manifest_hash": (beside(MANIFEST, json.dumps({"complete": True, "sha256": {CONFIG: 3}})), "has no sha256"),
}


@pytest.mark.parametrize(("change", "words"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_folders_are_refused(change, words, saved, tmp_path):
    """By this library, and by the classes of transformers given the same folder."""
    shutil.copytree(saved[1] / "whole", tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    for load in (sd.from_pretrained, transformers.GPT2LMHeadModel.from_pretrained):
        with pytest.raises(sd.ConfigError) as error:
            load(tmp_path)
        assert words in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is nested deeper"),
        (b'{"model_type": "\xff"}', "is not readable as JSON"),
        ("[]", "is damaged: not a JSON object"),
        (f'{{"a": 1{"0" * 5000}}}', "is not readable as JSON"),
        ("", "is not readable as JSON"),
    ],
    ids=["deep", "not UTF-8", "list", "digits", "empty"],
)
def test_files_that_are_not_of_transformers(text, words, tmp_path):
    written(text)(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(sd.ConfigError, match=f"{CONFIG} {words}"):
        sd.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 3, "weights.bin"])
def test_an_index_names_files_of_its_folder(place, saved, tmp_path):
    shutil.copytree(saved[1] / "shards", tmp_path / "saved")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    rewrite(tmp_path / "saved", INDEX, lambda i: i["weight_map"].update({min(i["weight_map"]): place}))
    with pytest.raises(sd.ConfigError, match=f"{INDEX} is damaged"):
        sd.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("change", [index(weight_map=[1]), index(metadata=None), index(weight_map=None), written("[]", INDEX)])
def test_damaged_index(change, saved, tmp_path):
    shutil.copytree(saved[1] / "shards", tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(sd.ConfigError, match=f"{INDEX} is damaged"):
        sd.from_pretrained(tmp_path)


@pytest.mark.parametrize("arguments", [{"variant": "fp16"}, {"use_safetensors": False}, {"gguf_file": "a.gguf"}], ids=str)
def test_other_weights_than_the_verified_ones(arguments, saved):
    with pytest.raises(sd.ConfigError, match="from its safetensors files only"):
        sd.from_pretrained(saved[1] / "whole", **arguments)


@pytest.mark.parametrize("name", ["eager", "sdpa", {"": "eager"}, None])
def test_attention_of_transformers_itself(name, saved, tmp_path):
    """In the file, and whatever the caller asks for."""
    shutil.copytree(saved[1] / "whole", tmp_path, dirs_exist_ok=True)
    host(_attn_implementation=name)(tmp_path)
    assert same(sd.from_pretrained(tmp_path), saved[0])
    assert sd.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


def test_code_of_a_folder_is_not_run(tmp_path):
    """Not even asked about, as transformers does for an unknown model type."""
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(sd.ConfigError, match="trust_remote_code"):
        sd.from_pretrained(tmp_path)
