"""Texts of words and of learned byte pairs: their vocabulary, the published archives, and runs of Transformer-XL on them."""

import io
import json
import math
import shutil
import signal
import tarfile
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from tests import tiny
from tests.conftest import ROOT
from tests.harness.test_resume import die
from utils.data import sources
from utils.data.corpus import Corpus
from utils.data.tokens import load_tokens
from utils.errors import UserError
from utils.reporting.records import read_record

TEXT = (
    "\n".join(" ".join(tiny.WORDS[(i * i + 3 * j) % 16] + "," * (j == 2) for j in range(1 + i % 9)) for i in range(400))
    + "\nOnce Été naïve\n"
)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def official(text: str, least: int = 0, size: int | None = None) -> list[str]:
    """The vocabulary of Transformer-XL's Vocab with special=["<eos>"], as it is described: by number, then first occurrence."""
    counts = Counter(word for line in text.splitlines() for word in line.strip().split())
    return ["<eos>", *(word for word, count in counts.most_common(size) if count >= least)]


def decoded(corpus: Corpus, split: str) -> list[str]:
    tokenizer = load_tokens(corpus.path / "tokenizer")[0]
    return [tokenizer.id_to_token(int(token)) for token in getattr(corpus, split)]


def test_words_are_those_of_the_official_code(run, text):
    folder, err = run(prepare, "mine", "--source", text, "--vocabulary", "words")
    corpus, vocabulary = Corpus.open(folder, ("tokens",)), load_tokens(folder / "tokenizer")[0].get_vocab()
    train = TEXT.encode()[: corpus.meta["text_bytes"]["train"]].decode()
    words = official(train)
    assert sorted(vocabulary, key=vocabulary.get) == ["<eos>", "<unk>", *words[1:]]  # the text has no <unk> of its own
    assert decoded(corpus, "train") == train.replace("\n", " <eos> ").split() and f"vocabulary: {len(words) + 1:,} tokens" in err
    known = set(words)
    rest = TEXT.encode()[corpus.meta["text_bytes"]["train"] :].decode().replace("\n", " <eos> ").split()
    found = decoded(corpus, "valid") + decoded(corpus, "test")
    assert len(found) in (len(rest), len(rest) + 1)  # a word may be cut between the splits
    assert found[-4:] == ["<unk>", "<unk>", "<unk>", "<eos>"] and {*found} <= known | {"<unk>"}
    assert sum(corpus.meta["text_bytes"].values()) == len(TEXT.encode()) and corpus.vocabulary.name == "mine"
    corpus.verify()


def test_rare_words_small_vocabularies_and_capitals(run, text):
    folder, _ = run(prepare, "few", "--source", text, "--vocabulary", "words", "--vocabulary_size", 6)
    corpus = Corpus.open(folder)
    train = TEXT.encode()[: corpus.meta["text_bytes"]["train"]].decode()
    assert list(load_tokens(folder / "tokenizer")[0].get_vocab().items()).__len__() == corpus.vocabulary.size == 6
    assert {*decoded(corpus, "train")} == {"<eos>", "<unk>", *official(train)[1:5]}
    least = Counter(train.split()).most_common()[3][1]
    folder, _ = run(prepare, "least", "--source", text, "--vocabulary", "words", "--min_frequency", least)
    assert {*load_tokens(folder / "tokenizer")[0].get_vocab()} == {"<unk>", *official(train, least)}
    folder, _ = run(
        prepare, "small", "--source", text, "--vocabulary", "words_and_punctuation", "--lower_case", "--valid", text, "--test", text
    )
    corpus = Corpus.open(folder)
    words = decoded(corpus, "train")
    assert words == decoded(corpus, "test") and words[-4:] == ["once", "été", "naïve", "<eos>"] and "," in words
    assert Counter(words)["<eos>"] == TEXT.count("\n") and not any("," in word for word in {*words} - {","})


def test_byte_pairs_lose_nothing(run, text):
    folder, _ = run(prepare, "pairs", "--source", text, "--vocabulary", "byte_pairs", "--vocabulary_size", 300)
    corpus, tokenizer = Corpus.open(folder), load_tokens(folder / "tokenizer")[0]
    whole = "".join(tokenizer.decode(getattr(corpus, split).tolist()) for split in ("train", "valid", "test"))
    assert whole == TEXT and corpus.vocabulary.size == 300 and len(corpus.train) < corpus.meta["text_bytes"]["train"] / 2


@pytest.mark.parametrize(
    "args, said",
    [
        (["--vocabulary", "words", "--min_frequency", 10**6], "no word occurs 1,000,000 times: give a smaller --min_frequency"),
        (["--min_frequency", 3], "--min_frequency needs --vocabulary: say what is learned, words, words_and_punctuation, byte_pairs"),
        (["--vocabulary", "byte_pairs", "--min_frequency", 3], "--min_frequency has no effect with --vocabulary byte_pairs"),
        (["--vocabulary", "byte_pairs", "--vocabulary_size", 256], "--vocabulary_size 256 is too small: give at least 257"),
        (["--vocabulary", "words", "--official_text"], "--official_text drops the newlines"),
        (["--vocabulary", "words", "--tokenizer", "some"], "--tokenizer gives a vocabulary and --vocabulary learns one"),
        (["--vocabulary", "words", "--valid", "some"], "--valid and --test go together"),
    ],
)
def test_contradictory_vocabularies_are_refused(refused, text, tmp_path, args, said):
    if "--tokenizer" in args:
        shutil.copytree(make_words(tmp_path / "w") / "tokenizer", tmp_path / "some")
        args[-1] = tmp_path / "some"
    assert said in refused(prepare, "mine", "--source", text, *args)


def test_another_vocabulary_than_the_prepared_one_is_refused(run, refused, text):
    folder, _ = run(prepare, "mine", "--source", text, "--vocabulary", "words")
    assert "already" in run(prepare, "mine", "--source", text, "--vocabulary", "words", "--verify")[1]
    assert f"{folder} has learned" in refused(prepare, "mine", "--source", text, "--vocabulary", "words", "--min_frequency", 2)
    assert "has unit 'tokens', not 'bytes'" in refused(prepare, "mine", "--source", text)


# published archives


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name, suffix", [("wikitext-103", ".zip"), ("lm1b", ".tar.gz")])
def test_published_archives(run, refused, tmp_path, monkeypatch, name, suffix):
    """The splits are those of the archive, in which one may be several files, and its words are the symbols."""
    entry = sources.TEXTS[name]
    parts = {split: f" {split} = <unk> it \n \n it is {split} . \n".encode() * 40 for split in ("train", "valid", "test")}
    files = {
        "wikitext-103": {f"wikitext-103/wiki.{split}.tokens": content for split, content in parts.items()} | {"wikitext-103/": b""},
        "lm1b": {
            f"{sources._LM1B}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100": parts["train"][:60],
            f"{sources._LM1B}/training-monolingual.tokenized.shuffled/news.en-00002-of-00100": parts["train"][60:],
            f"{sources._LM1B}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": parts["test"],
            f"{sources._LM1B}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": parts["valid"],
            f"{sources._LM1B}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00002-of-00050": b"never read",
        },
    }[name]
    archive = archive_of(tmp_path / f"mine{suffix}", files)
    said = refused(prepare, name, "--source", archive)
    assert f"{archive} has {archive.stat().st_size:,} bytes with sha256" in said and "choose another name" in said
    content = archive.read_bytes()
    monkeypatch.setitem(sources.TEXTS, name, entry._replace(archive_digest=f"sha256:{prepare.digest_of([content], 'sha256')[1]}"))
    folder, _ = run(prepare, name, "--source", archive)
    corpus = Corpus.open(folder)
    assert (corpus.title, corpus.unit) == (name, "tokens")
    assert corpus.meta["text_bytes"] == {split: len(content) for split, content in parts.items()}
    assert decoded(corpus, "train")[:6] == ["train", "=", "<unk>", "it", "<eos>", "<eos>"]
    vocabulary = load_tokens(folder / "tokenizer")[0].get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == ["<eos>", "train", "it", "=", "<unk>", "is", "."]
    archive.write_bytes(content[:-40])
    assert "choose another name" in refused(prepare, name, "--source", archive, "--force")
    monkeypatch.setitem(sources.TEXTS, name, entry._replace(archive_digest=f"sha256:{prepare.digest_of([content[:-40]], 'sha256')[1]}"))
    assert f"{archive} is not a complete archive" in refused(prepare, name, "--source", archive, "--force")


def test_wikitext_2_has_the_published_held_out_splits(run, tmp_path):
    """The real text of validation and test; without it the test is skipped."""
    folder = ROOT.parent / "shared" / "data" / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("no WikiText-2 here")
    valid, test = folder / "valid.txt.xz", folder / "test.txt.xz"
    prepared, _ = run(prepare, "w2", "--source", valid, "--valid", valid, "--test", test, "--vocabulary", "words")
    assert (len(Corpus.open(prepared).valid), len(Corpus.open(prepared).test)) == (
        217_646,
        245_569,
    )  # Merity et al. (2016), table 1, <eos> too


# runs


def make_words(folder: Path, **more: object) -> Path:
    """A prepared text of words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.txt").write_text(TEXT * 3)
    args = ["words", "--source", folder / "source.txt", "--vocabulary", "words", "--out", folder / "data", "--held_out", 900]
    assert prepare.main([str(arg) for arg in args]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    return make_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny.completed(tiny.flags(words, folder, method="smoe_dropout", attack="swap", attack_rate=0.2))
    return folder


def test_a_run_on_words_measures_perplexity_and_resumes(words, trained, tmp_path):
    broken = tiny.flags(words, tmp_path / "broken", method="smoe_dropout", attack="swap", attack_rate=0.2)
    assert tiny.run(broken, partial(die, "step", 13, False)).code == -signal.SIGKILL
    tiny.completed(broken)
    tiny.same_run(trained, tmp_path / "broken")
    record = read_record(trained / "result.json")
    assert record["metric"]["name"] == "perplexity" and record["attack"] == {"kind": "swap", "rate": 0.2}
    corpus = Corpus.open(words)
    for row in record["quality"]:
        bits = math.log2(row["test"]) * len(corpus.test) / corpus.meta["text_bytes"]["test"]
        assert row["test_bits_per_byte"] == pytest.approx(bits) and row["test_attacked"] > row["test"]
    assert record["quality"][-1]["test"] < 0.7 * corpus.vocabulary.size


def test_a_run_can_be_attacked_later(words, trained):
    argv = f"--eval_only --k 4 --work_dir {trained} --attack random --attack_rate 0.5 --device cpu".split()
    tiny.completed(argv)
    row = json.loads((trained / "eval.json").read_text())["quality"][0]
    assert row["test"] == read_record(trained / "result.json")["quality"][-1]["test"] and row["test_attacked"] > row["test"]


def tuned(task: str, rows: Path, folder: Path, checkpoint: Path) -> list[str]:
    short = {"max_step": 4, "batch_size": 4, "eval_interval": 2, "warmup_step": 0, "device": "cpu", "threads": 1, "preset": "quick"}
    flags = short | {"task": task, "data": rows, "work_dir": folder, "checkpoint": checkpoint}
    return [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--yes"]


def test_a_run_of_words_is_fine_tuned_with_its_vocabulary(trained, words, tmp_path):
    rows = tiny.write_rows(tmp_path / "sst2", "sst2")
    tiny.completed(tuned("sst2", rows, tmp_path / "run", trained), program="finetune.py")
    assert 0 <= read_record(tmp_path / "run" / "result.json")["quality"][0]["dev"] <= 100
    problems = tiny.write_rows(tmp_path / "svamp", "svamp")
    said = tiny.run(tuned("svamp", problems, tmp_path / "other", trained), program="finetune.py")
    assert said.code == 2 and "writes words, and equations are written in bytes" in said.err
    said = tiny.run(["--checkpoint", str(trained)], program="generate.py")
    assert said.code == 2 and "reads tokens, and generate.py continues bytes" in said.err


def test_what_no_longer_belongs_to_the_text_is_refused(words, trained, tmp_path):
    """A file of another size, another vocabulary, and words that the run was not trained on: each is named."""
    copy = Path(shutil.copytree(words, tmp_path / "copy"))
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"router"', '"routes"'))
    said = tiny.run(tiny.flags(copy, tmp_path / "run", method="dense"))
    assert said.code == 2 and f"{path} has sha256" in said.err
    (copy / "train.bin").write_bytes((copy / "train.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"{copy / 'train.bin'} has .* bytes, meta.json says"):
        Corpus.open(copy)
    other = make_words(tmp_path / "other")
    prepare.main(
        [
            "words",
            "--source",
            str(tmp_path / "other" / "source.txt"),
            "--vocabulary",
            "words",
            "--min_frequency",
            "100",
            "--out",
            str(other),
            "--force",
        ]
    )
    said = tiny.run(tiny.flags(other, tmp_path / "more", method="smoe_dropout", start_from=trained))
    assert said.code == 2 and "was trained on other" in said.err
    said = tiny.run(tiny.flags(tiny.write_corpus(tmp_path / "bytes"), tmp_path / "b", method="dense", attack="swap"))
    assert said.code == 2 and "--attack swap needs a text of words, whose vocabulary has <unk>" in said.err
    assert np.array_equal(Corpus.open(words).train, Corpus.open(make_words(tmp_path / "again")).train)
