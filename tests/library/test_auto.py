"""The auto classes and pipelines of transformers load models with experts in every way, or refuse; they never build a dense model."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.hf.described import placed_conversions
from tests.conftest import ROOT
from tests.library.test_hosts import TOKENS, logits, made

transformers = pytest.importorskip("transformers")

EXACT = sd.SMoEConfig(4, 3, router="learned", expert_init="split", layers=(0, 2))
PLAIN = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
for kind, words in ((AutoModelForCausalLM, "trust_remote_code"), (GPT2LMHeadModel, "smoe_dropout")):
    try:
        kind.from_pretrained(sys.argv[1])
    except Exception as error:
        assert words in str(error), error
    else:
        raise SystemExit(f"{kind} loaded it")
"""
WAYS = {  # what a process does before it loads a folder as `model`
    "transformers first": PLAIN + "trusted = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])  # the library has been imported by now\n"
    "assert all(torch.equal(*pair) for pair in zip(trusted.state_dict().values(), model.state_dict().values(), strict=True))",
    "smoe_dropout first": "import sys, smoe_dropout; assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    "import importlib.util, transformers; importlib.util.find_spec('transformers.modeling_utils')\n"  # a question, which imports nothing
    "importlib.util.find_spec('transformers.models.auto.configuration_auto')\n"
    "config = transformers.AutoConfig.from_pretrained(sys.argv[1])\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], config=config); import torch",
}


def saved(host: str, folder: Path, **changes) -> nn.Module:
    model = sd.moefy(made(host), EXACT if not changes else sd.SMoEConfig(4, 3, **changes))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_fresh_processes(way, tmp_path):
    model = saved("gpt2", tmp_path / "saved")
    program = f"{way}\ntorch.save([model(torch.tensor({TOKENS.tolist()})).logits, model.name_or_path], sys.argv[2])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    computed, name = torch.load(tmp_path / "out")
    assert torch.equal(computed, logits(model)) and name == str(tmp_path / "saved")


def test_another_head(tmp_path):
    """The body is loaded and the head is fresh, as in transformers; what the body lacks is refused."""
    model = saved("bert", tmp_path)
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    for load in (transformers.AutoModelForSequenceClassification.from_pretrained, one_of(transformers.BertForSequenceClassification)):
        other = load(tmp_path, **labels)
        assert type(other) is transformers.BertForSequenceClassification and other(TOKENS).logits.shape == (len(TOKENS), 3)
        body = model.bert.state_dict()
        assert all(torch.equal(body[name], tensor) for name, tensor in other.bert.state_dict().items() if not name.startswith("pooler."))
        assert len(sd.moe_layers(other)) == 2 and sd.get_top_k(other) == 3
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.BertModel
    other.save_pretrained(tmp_path / "three")
    with pytest.raises(sd.ConfigError, match=r"classifier\.\w+ has shape \(3.*ignore_mismatched_sizes"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "three", num_labels=2)
    resized = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "three", num_labels=2, ignore_mismatched_sizes=True
    )
    assert resized(TOKENS).logits.shape == (len(TOKENS), 2) and torch.equal(
        resized.bert.pooler.dense.weight, other.bert.pooler.dense.weight
    )


def test_configuration_without_experts_is_refused(tmp_path):
    saved("gpt2", tmp_path)
    with pytest.raises(sd.ConfigError, match="the model there has experts, and the given GPT2Config describes none"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=made("gpt2").config)


def test_language_model_of_a_composite_model(tmp_path):
    """A part that has a configuration of its own is converted, and the whole is saved."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    seeing = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(
        vision_config=seeing, text_config=transformers.LlamaConfig(**sizes, vocab_size=50), image_token_index=3
    )
    model = transformers.LlavaForConditionalGeneration(config)
    sd.moefy(model.model.language_model, sd.SMoEConfig(4, 3))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def one_of(kind: type):
    return lambda folder, **changes: sd.from_pretrained(folder, kind, **changes)


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.intermediate.experts.up", "bert.encoder.layer.0.attention.self.query.weight"])
def test_another_head_on_an_incomplete_body(name, tmp_path):
    from safetensors.torch import load_file, save_file

    saved("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(sd.ConfigError, match=f"missing .*{name}"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_configuration_builds_a_model_with_experts():
    model = sd.moefy(made("gpt2"), EXACT)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model) and placed_conversions(fresh.config) == placed_conversions(model.config)
    assert fresh.state_dict().keys() == model.state_dict().keys() and len(sd.moe_layers(fresh)) == 2


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"dtype": torch.bfloat16}, lambda m: m.dtype == torch.bfloat16 and sd.moe_layers(m)[0][1].router.weight.dtype == torch.float32),
        ({"device_map": "cpu"}, lambda m: m.device.type == "cpu"),
        ({"attn_implementation": "eager"}, lambda m: m.config._attn_implementation == "eager"),
        ({"output_loading_info": True}, lambda pair: pair[1]["missing_keys"] == set()),
        ({"resid_pdrop": 0.7}, lambda m: m.transformer.h[0].attn.resid_dropout.p == 0.7),
    ],
    ids=["dtype", "device_map", "attention", "info", "configuration"],
)
def test_arguments_of_transformers(options, check, tmp_path):
    saved("gpt2", tmp_path)
    assert check(sd.from_pretrained(tmp_path, **options)) and check(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options))


def test_quantisation_is_refused(tmp_path):
    """It would replace linear maps and leave the experts."""
    saved("gpt2", tmp_path)
    with pytest.raises(sd.ConfigError, match=r"would quantise the attention of .* but not its experts"):
        sd.from_pretrained(tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_repository_of_the_hub(tmp_path):
    """By its id, from the cache of a machine that is offline."""
    commit, repository = "0" * 40, tmp_path / "models--someone--experts"
    model = sd.moefy(made("gpt2"), EXACT)
    sd.save_pretrained(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    named = {"cache_dir": tmp_path, "local_files_only": True}
    for revision in (None, commit):
        loaded = sd.from_pretrained("someone/experts", revision=revision, **named)
        assert torch.equal(logits(loaded), logits(model)) and loaded.name_or_path == "someone/experts"
    weights = repository / "snapshots" / commit / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(sd.ConfigError, match=r"someone/experts/model\.safetensors is damaged"):
        sd.from_pretrained("someone/experts", **named)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; `server.files` are the committed ones."""

    def do_POST(self):
        """Answer with what the client asks for."""
        body, answer = self.rfile.read(int(self.headers["Content-Length"])), {"url": "https://huggingface.co/me/saved"}
        if "/preupload/" in self.path:
            answer = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            }
        if "/commit/" in self.path:
            values = [json.loads(line)["value"] for line in body.splitlines()]
            self.server.files = {value["path"]: base64.b64decode(value["content"]) for value in values if "path" in value}
            answer = {"commitUrl": "https://huggingface.co/me/saved/commit/0", "commitOid": "0" * 40}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        """Nothing."""


def test_upload_to_the_hub(tmp_path, monkeypatch):
    model = sd.moefy(made("gpt2"), EXACT)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(transformers.utils.hf_api(), "endpoint", f"http://127.0.0.1:{server.server_port}")
        sd.save_pretrained(model, tmp_path / "saved", push_to_hub=True, repo_id="me/saved", token="hf_letters")
        server.shutdown()
    (tmp_path / "loaded").mkdir()
    for name, content in server.files.items():
        (tmp_path / "loaded" / name).write_bytes(content)
    assert torch.equal(logits(sd.from_pretrained(tmp_path / "loaded")), logits(model)) and "notes.txt" not in server.files


def test_pipeline(tmp_path):
    """A pipeline tries the class itself when the auto class has refused."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, **{letter: place for place, letter in enumerate("abc", 1)}}, "[UNK]")
    )
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]", eos_token="[UNK]")
    model = saved("gpt2", tmp_path)
    fast.save_pretrained(tmp_path)
    writer = transformers.pipeline("text-generation", str(tmp_path))
    assert len(sd.moe_layers(writer.model)) == 2
    ids = fast("a b c", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
    said = writer("a b c", max_new_tokens=3, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert said == expected.tolist()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match=r"model\.safetensors cannot be read"):
        transformers.pipeline("text-generation", str(tmp_path))


@pytest.mark.parametrize("auto", [True, False])
def test_architecture_that_reuses_the_class_of_another(auto, tmp_path):
    """InternLM3 is a configuration of its own for Llama's class."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = sd.moefy(
        transformers.AutoModelForCausalLM.from_config(transformers.InternLM3Config(**sizes, vocab_size=50)), sd.SMoEConfig(4, 2)
    )
    assert type(model) is transformers.LlamaForCausalLM
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path) if auto else sd.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
