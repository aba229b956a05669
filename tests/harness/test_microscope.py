"""python -m utils.microscope: the page and the record of a run and of a folder of transformers."""

import base64
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import smoe_dropout as sd
from tests import tiny
from utils import doctor, documents, microscope
from utils.errors import UserError
from utils.reporting.microscope_record import PAGE, RECORD, read_examination
from utils.training import routing
from utils.training.examination import CHECKPOINTS, _spread, examine_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run and what the microscope made of it, a converted model of transformers with its tokenizer, and a text."""
    folder, draw = tmp_path_factory.mktemp("microscope"), random.Random(0)
    corpus = tiny.write_corpus(folder / "words", held_out_bytes=700)
    tiny.completed(tiny.flags(corpus, folder / "run", method="smoe", lr=3e-2))
    microscope.main([str(folder / "run"), "--out", str(folder / "seen"), "--tokens", str(routing.BATCHES * 2 * 8)])
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(tiny.WORDS, k=12)) for _ in range(40)))
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(("[UNK]", *tiny.WORDS))}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 1 + len(tiny.WORDS),
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=16, initializer_range=0.3))
    model.save_pretrained(folder / "dense")
    sd.save_pretrained(sd.moefy(model, sd.SMoEConfig(num_experts=4, top_k=2, expert_init="split")), folder / "llama")
    for name in ("llama", "dense"):
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder / name)
    return folder


def test_a_run_is_measured_as_in_its_record(place):
    """On as many batches the numbers are those of the run's final evaluation, and its quality."""
    found, record = read_examination(place / "seen"), tiny.read_json(place / "run" / "result.json")
    expected, layers = record["routing"], found["layers"]
    assert [layer["load_entropy"] for layer in layers] == expected["load_entropy_by_layer"] and found["k"] == expected["k"]
    assert [layer["mean_cosine"] for layer in layers] == pytest.approx(expected["output_similarity_by_layer"])
    changes = found["checkpoints"]
    assert changes["steps"] == [16, 24] and changes["fluctuation"][-1] == expected["fluctuation_by_layer"]
    assert len(changes["saturation"]) == 1 and all(0 < share <= 1 for shares in changes["saturation"] for share in shares)
    assert [one["k"] for one in found["by_k"]] == [1, 2, 4] and all(0 < one["calibration_error"] < 1 for one in found["by_k"])
    assert found["subject"]["config_sha256"] == record["config_sha256"] and found["findings"]
    assert all(layer["loss_without_first"] is not None and len(layer["cka"]) == 4 for layer in layers)


def test_the_page_stands_alone(place):
    """No script, and nothing from elsewhere; every figure is a PNG in it; faults stand at its top."""
    page, found = (place / "seen" / PAGE).read_text(), read_examination(place / "seen")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG") for source in sources)
    assert not re.search(r"<script|https?:|@import|url\(|<link|<iframe", re.sub(r"base64,[^\"]+", "", page))
    assert found["findings"][0] in page and page.index(found["findings"][0]) < page.index("<h2>Layers")
    assert page.count("<td>layers.") == len(found["layers"]) and str(place) not in page


@pytest.mark.parametrize(("name", "said"), [(PAGE, "microscope.html is damaged"), (RECORD, "microscope.json"), (None, "is missing")])
def test_damage_is_found(place, tmp_path, capsys, name, said):
    shutil.copytree(place / "seen", copy := tmp_path / "seen")
    assert doctor.main([str(copy)]) == 0 and "a folder of the microscope" in capsys.readouterr().out
    if name:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content.replace(b"0.", b"1.", 1))
    else:
        (copy / PAGE).unlink()
    with pytest.raises(documents.Damaged, match=said):
        read_examination(copy)
    assert doctor.main([str(copy)]) == 1 and "microscope.json: damaged" in capsys.readouterr().out


def test_a_folder_of_transformers_on_a_text(place):
    found = examine_folder(place / "llama", str(place / "text.txt"), 3, 200, 512)
    assert found["k"] == 3 and found["tokens"] == 192 and found["checkpoints"] is None and found["subject"]["folder"] == "llama"
    assert [one["k"] for one in found["by_k"]] == [1, 2, 3, 4] and len(found["layers"]) == 2
    model = sd.from_pretrained(place / "llama")
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(place / "llama")((place / "text.txt").read_text())["input_ids"][:192]])
    with torch.no_grad(), sd.top_k(model, 4):
        losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(16, 1)]
    assert found["by_k"][-1]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{0}/llama", "needs a text: give a file by --data, not None"),
        ("{0}/llama --data {0}/llama/model.safetensors", "is not a UTF-8 text"),
        ("{0}/llama --data {0}/text.txt --k 9", "k = 9 must be a whole number of at least 1 and at most 4"),
        ("{0}/dense --data {0}/text.txt", "has no mixture-of-experts blocks of its own"),
        ("{0}/words", "holds no run"),
        ("{0}/cut", r"lacks the last checkpoint, step-00000024"),
    ],
)
def test_refusals_write_nothing(place, tmp_path, words, said):
    if not (place / "cut").exists():
        shutil.copytree(place / "run", place / "cut")
        shutil.rmtree(place / "cut" / "checkpoints" / "step-00000024")
    with pytest.raises((UserError, sd.ConfigError), match=said):
        microscope.main([*words.format(place).split(), "--out", str(tmp_path / "seen")])
    assert not [*tmp_path.iterdir()]


def test_many_checkpoints_are_at_most_eight_curves():
    assert _spread([*range(1, 101)])[:: CHECKPOINTS - 1] == [1, 100] and len({*_spread([*range(1, 101)])}) == CHECKPOINTS
    assert _spread([3]) == [3] and _spread([3, 5]) == [3, 5] and _spread([]) == []
