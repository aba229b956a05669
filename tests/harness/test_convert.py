"""convert.py: what it takes, refuses and writes."""

import json
import lzma
import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import convert
import smoe_dropout as sd
from tests.conftest import ROOT
from tests.tiny import WORDS
from utils.cli.convert import Origin, opened, parse
from utils.data.plain_text import windows
from utils.errors import UserError

REAL = os.environ.get("SMOE_GGUF", "")  # a GGUF file of a causal language model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a causal model and an encoder, and their tokenizer."""
    folder, draw = tmp_path_factory.mktemp("convert"), random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    with lzma.open(folder / "text.txt.xz", "wt") as file:
        file.write("\n".join(lines))
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(("[UNK]", *WORDS))}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1 + len(WORDS)}
    torch.manual_seed(0)
    for name, model in (
        ("llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=16, initializer_range=0.3))),
        ("bert", transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.3))),
    ):
        model.save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder / name)
    return folder


def test_every_part_begins_as_the_tokenizer_begins_a_text(place):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama")
    text = " ".join(WORDS)
    plain = [*windows(text, tokenizer, 10, 4, writes=True)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 0)])
    parts = [*windows(text, tokenizer, 10, 4, writes=True)]
    assert plain == [[1, 2, 3, 4], [5, 6, 7, 8]] and parts == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]


@pytest.mark.parametrize(("model", "text", "said"), [("llama", "text.txt", "dense"), ("bert", "text.txt.xz", "relative change")])
def test_a_folder_becomes_one_that_loads(place, tmp_path, monkeypatch, capsys, model, text, said):
    """Exact at k = E, with k as asked for, its tokenizer, and an account of what was done, which holds the losses."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out.partial").mkdir()  # of an interrupted run
    words = (
        f"--from {place / model} --data {place / text} --out out --num_experts 4 --k 3 --tokens 300 --held_out 100 --length 20 --threads 1"
    )
    convert.main(*parse(words.split()))
    assert said in capsys.readouterr().out and {path.name for path in Path().iterdir()} == {"out"}
    loaded = sd.from_pretrained("out")
    assert sd.get_top_k(loaded) == 3 and loaded.config.architectures == [type(loaded).__name__]
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained("out")("the frozen router sends")["input_ids"]])
    assert ids[0, :4].tolist() == [1, 2, 3, 4]
    before = getattr(transformers, type(loaded).__name__).from_pretrained(place / model)(input_ids=ids)[0]
    with sd.top_k(loaded, 4):
        torch.testing.assert_close(loaded(input_ids=ids)[0], before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loaded(input_ids=ids)[0], before, atol=1e-3)
    account = json.loads(Path("out/conversion.json").read_text())
    assert account["tokens"] == 300 - 300 % 16 * (model == "llama") and [*account["losses"]] == ["4", "3", "2", "1"]
    assert account["losses"]["4"] == pytest.approx(account["dense_loss"], abs=1e-5) and account["losses"]["1"] > account["dense_loss"]
    assert account["weights_sha256"].keys() == {"model.safetensors"} and account["flags"]["num_experts"] == 4
    convert.main(*parse([*words.split(), "--cut", "coactivation", "--gate_weight", "unit"]))  # the defaults
    assert capsys.readouterr().out.endswith("done already: out\n")
    with pytest.raises(UserError, match="holds something already"):
        parse([*words.split(), "--expert_init", "copy"])
    Path("other").write_text("another text")
    with pytest.raises(UserError, match="--out out was made of another text"):
        convert.main(*parse(words.replace(str(place / text), "other").split()))
    with pytest.raises(UserError, match="--out out holds something already"):
        parse([*words.split(), "--seed", "5"])


@pytest.mark.parametrize(
    ("model", "text", "flags", "said"),
    [
        ("llama", "text.txt", "--num_experts 5", "32 of 'model.layers.0.mlp' is not divisible by num_experts = 5"),
        ("llama", "llama/model.safetensors", "", "is not a UTF-8 text"),
        ("llama", "short.txt", "", "short.txt is too short"),
        ("empty", "blank.txt", "", "blank.txt is empty"),
        ("llama", "text.txt", "--router hash", "no effect with router 'hash'"),
        ("empty", "text.txt", "", "empty cannot be loaded by transformers"),
    ],
)
def test_faults_of_model_and_text_leave_nothing(place, tmp_path, monkeypatch, model, text, flags, said):
    monkeypatch.chdir(tmp_path)
    (place / "short.txt").write_text("the frozen")
    (place / "blank.txt").write_text("\n")
    (place / "empty").mkdir(exist_ok=True)
    (place / "empty" / "config.json").write_text("{}")
    words = f"--from {place / model} --data {place / text} --out out --num_experts 4 {flags} --threads 1"
    with pytest.raises((UserError, sd.ConfigError), match=said):
        convert.main(*parse(words.split()))
    assert not [*tmp_path.iterdir()]


def test_a_model_is_a_folder_a_gguf_file_or_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/a.gguf", "two/a.gguf", "two/b.gguf", "model/config.json", "model/a.safetensors", "model/b.gguf"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert opened(Path("one")) == opened(Path("one/a.gguf")) == Origin("one", "a.gguf")
    assert opened(Path("model")) == Origin("model") and opened(Path("model")).weights == [Path("model/a.safetensors")]
    assert opened(Path("owner/name")) == Origin("owner/name") and opened(Path("owner/name")).weights == []
    wrong = {"two": "2 GGUF files", "model/a.safetensors": "not a GGUF file", "/no/where": "does not exist", "a/b/c": "does not exist"}
    for path, said in wrong.items():
        with pytest.raises(UserError, match=said):
            opened(Path(path))


@pytest.mark.skipif(not Path(REAL).is_file(), reason="needs SMOE_GGUF, the path of a GGUF file, and the gguf package")
def test_a_gguf_file_becomes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ROOT / "README.md"
    words = f"--from {REAL} --data {text} --out out --tokens 600 --held_out 100 --length 100 --threads 1"
    convert.main(*parse(words.split()))
    account = json.loads(Path("out/conversion.json").read_text())
    assert account["losses"]["16"] == pytest.approx(account["dense_loss"], abs=1e-3)
    assert sd.from_pretrained("out").dtype == torch.float32
