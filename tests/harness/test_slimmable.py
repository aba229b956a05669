"""python -m benchmarks slimmable: records of converted models, resumed, and their page. Nothing here asserts a time."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import smoe_dropout as sd
from benchmarks import slimmable, slimmable_tasks
from benchmarks.slimmable_table import dense_row, load, quality_table, render, stages
from tests import tiny
from tests.conftest import ROOT
from utils import documents
from utils.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A dense model, a narrower one, the first one converted, an encoder, and a text."""
    folder = tmp_path_factory.mktemp("slimmable")
    words = {"[UNK]": 0, **{word: place for place, word in enumerate(dict.fromkeys(tiny.WORDS), 1)}}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, unk_token="[UNK]", eos_token="[UNK]")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, width in (("dense", 32), ("narrow", 16)):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=width, tie_word_embeddings=True))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "dense":
            sd.save_pretrained(sd.moefy(model, sd.SMoEConfig.exact(4)), folder / "split")
    (folder / "text.txt").write_text(" ".join(word for turn in range(9) for word in tiny.WORDS[turn % 3 :]))
    return folder


def flags_of(folder: Path) -> slimmable.SlimmableFlags:
    return slimmable.SlimmableFlags(
        converted=(f"as cut={folder / 'split'}",),
        dense=folder / "dense",
        others=(folder / "narrow",),
        text=folder / "text.txt",
        package="none 1.0",
        k=(1, 2),
        tokens=64,
        context=16,
        prompt=4,
        generated=2,
        rounds=1,
        out=folder / "records",
    )


def test_a_record_has_every_k_and_is_continued(folders, capsys):
    flags = flags_of(folders)
    slimmable.run(flags)
    (record,) = load(flags.out)
    dense, rows = dense_row(record), stages(record)["as cut"]
    assert [row["k"] for row in rows] == [4, 2, 1] and record["model"]["package"] == "none 1.0"
    assert rows[0]["error"] < 1e-5 < rows[1]["error"] and rows[0]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    expert, router = 3 * 16 * 8 + 2 * 8 + 16, 4 * 16 + 4  # maps and biases
    assert rows[0]["weights"] - rows[2]["weights"] == 2 * 3 * expert
    assert rows[0]["weights"] - dense["weights"] == 2 * (4 * (expert - 3 * 16 * 8) + router)  # those that the dense model does not have
    lines = quality_table(record).splitlines()
    assert len(lines) == 7 and lines[-1].startswith("| dense narrow | ") and "## dense" in render(flags.out)
    changed = record | {"rows": [row | {"perplexity": 2.5} for row in record["rows"]]}
    documents.write(flags.out / "dense.json", changed)
    slimmable.run(flags)  # finds nothing to do
    assert {row["perplexity"] for row in load(flags.out)[0]["rows"]} == {2.5}
    slimmable.run(replace(flags, rounds=2))  # times are measured anew, and nothing else
    (record,) = load(flags.out)
    assert record["timing"]["rounds"] == 2 and all(row["perplexity"] == 2.5 and row["ratio"] > 0 for row in record["rows"])
    slimmable.run(replace(flags, tokens=48))  # another text
    assert load(flags.out)[0]["rows"][0]["perplexity"] not in (2.5, dense["perplexity"])


def test_what_cannot_be_measured_is_refused(folders, tmp_path):
    flags, run = flags_of(folders), tmp_path / "run"
    shutil.copytree(folders / "split", run / "model")
    (run / "config.json").write_text("{}")
    for changes, sentence in (
        ({"text": None}, "--dense FOLDER and --text FILE are needed"),
        ({"converted": ("split",)}, "'split' is not one of several STAGE=FOLDER"),
        ({"converted": (f"cut={folders / 'narrow'}",)}, "narrow: dense models are given by --dense"),
        ({"dense": folders / "split"}, "split: dense models are given"),
        ({"dense": tmp_path}, "is no folder of transformers: give one with config.json"),
        ({"converted": (f"cut={run}",)}, f"{run} is no folder of transformers: give {run / 'model'}"),
        ({"tokens": 4096, "context": 4096}, "and a sequence has --context 4096: give a longer text"),
    ):
        with pytest.raises(UserError, match=sentence):
            slimmable.run(replace(flags, out=tmp_path / "records", **changes))
    assert not list(tmp_path.glob("records/*")) or load(tmp_path / "records")


def test_a_table_says_what_half_the_experts_lose_and_which_runs_are_missing(tmp_path, monkeypatch, capsys):
    """The committed records of a dense model and of one with experts are given other scores and seeds."""
    names = {"dense": "sst2-dense-seed1", "half": "sst2-fitted-elastic-seed1"}
    dense, half = (documents.read(ROOT / "results" / "slimmable" / "minilm" / f"{name}.json", dict, "") for name in names.values())
    monkeypatch.chdir(tmp_path)

    def run(record: dict, name: str, seed: int, **scores: float) -> None:
        quality = [row | {"dev": scores[f"k{row['k']}"]} for row in record["quality"]]
        folder = Path("runs/tiny/sst2") / f"{name}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        documents.write(folder / "result.json", record | {"seed": seed, "quality": quality})

    ks = {f"k{k}": 50.0 for k in (1, 2, 4, 16)}
    for seed, whole, part in ((1, 88.0, 86.6), (2, 90.0, 88.6)):
        run(dense, "dense", seed, kNone=whole)
        run(half, "half", seed, k8=part, **ks)
    slimmable_tasks.main(["runs/tiny", "--collect"])
    text = capsys.readouterr().out
    assert "| dense | dense | 89.0 (88.0, 90.0) |" in text
    assert "| fitted-elastic | coactivation cut, 4 shared, fitted router; Elastic k, k from 4 |" in text
    assert "| 50.0 (50.0, 50.0) | 87.6 (86.6, 88.6) |" in text and "| -1.4 | 0.67 |" in text
    assert "within 1.5 points of the dense model, with all seeds (n = 2): fitted-elastic (-1.4).\n" in text
    assert "Not run: tasks CommonsenseQA, ASDiv-A, MAWPS, SVAMP." in text
    collected = sorted(path.name for path in Path("results/slimmable/tiny").iterdir())
    assert collected == [f"sst2-{name}-seed{seed}.json" for name in ("dense", "fitted-elastic") for seed in (1, 2)]
    run(half, "half", 1, k8=80.0, **ks)
    Path("runs/tiny/sst2/half-seed2/result.json").unlink()
    slimmable_tasks.main(["runs/tiny"])
    text = capsys.readouterr().out
    assert "with all seeds (n = 2): none. Others: fitted-elastic (-8.0, n = 1)." in text
    assert "Not run: SST-2, seed 2: fitted-elastic; tasks" in text
    with pytest.raises(UserError, match="holds another run"):
        slimmable_tasks.main(["runs/tiny", "--collect"])
    pretrained = dense["pretrained"] | {"sha256": "0" * 64}
    documents.write(Path("runs/tiny/sst2/dense-seed2/result.json"), dense | {"seed": 2, "pretrained": pretrained})
    with pytest.raises(UserError, match="several dense models"):
        slimmable_tasks.main(["runs/tiny"])
