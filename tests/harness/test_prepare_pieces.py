"""data/prepare_pieces.py: the pieces it writes, and the texts and tokenizers it refuses."""

import gzip
import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest

from data import prepare_pieces
from tests.conftest import ROOT
from tests.tiny import WORDS
from utils.data.corpus import Corpus
from utils.data.tokenizer import load_tokenizer
from utils.documents import MARKS
from utils.errors import UserError

transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("datasets")

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##er", "un", "##known", ".", ",")
SEP = PIECES.index("[SEP]")
TOKENIZERS = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT) / "data" / "tokenizers"


def random_lines() -> list[str]:
    """Lines of known and unknown words; some are empty or blank, the first and the last among them."""
    draw = random.Random(1)
    words = (*WORDS, "routers", "Tokens,", "unknown", "xyz.")
    return ["", *(["", " ", "\t"][i % 3] if i % 9 == 4 else " ".join(draw.choices(words, k=draw.randrange(1, 12))) for i in range(300)), ""]


LINES = random_lines()


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Disables access to the hub."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tokenizer and with the text in every format."""
    import pyarrow
    from pyarrow import csv, parquet

    folder = tmp_path_factory.mktemp("inputs")
    write_vocabulary(folder / "tiny-bert")
    plain = "\n".join(LINES).encode() + b"\n"
    rows = [{"text": line, "story": line[::-1], "length": len(line)} for line in LINES]
    json_lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "a.txt": plain,
        "a.txt.xz": lzma.compress(plain),
        "a.txt.gz": gzip.compress(plain),
        "crlf.txt": plain.replace(b"\n", b"\r\n"),
        "b[1].txt": plain,  # as a glob it would be b1.txt
        "a.jsonl": json_lines,
        "packed.jsonl.xz": lzma.compress(json_lines),
        "story.jsonl": "".join(json.dumps({"text": "no", "story": row["text"] or None}) + "\n" for row in rows).encode(),
        "cut.txt.xz": lzma.compress(plain)[:-30],
        "latin.txt": plain + b"\xe9",
        "short.txt": b"the router\n" * 499,
        "empty.txt": b"",
        "bad.jsonl": b"{no json\n",
        "bad.parquet": b"no parquet",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    parquet.write_table(table, folder / "a.parquet")
    csv.write_csv(table, folder / "a.csv")
    return folder


def write_vocabulary(folder: Path, pieces: tuple[str, ...] = PIECES) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(inputs):
    """The same tokenizer, made without the program."""
    return transformers.BertTokenizerFast(vocab=str(inputs / "tiny-bert" / "vocab.txt"))


def expected(tokenizer, lines: list[str]) -> list[int]:
    """Each line tokenized separately, and one separator for consecutive blank lines between two others."""
    pieces, separated = [], True
    for line in lines:
        if line.strip():
            pieces += tokenizer(line, add_special_tokens=False)["input_ids"]
        elif not separated:
            pieces.append(SEP)
        separated = not line.strip()
    return pieces


@pytest.fixture
def argv(inputs, monkeypatch):
    """argv(*options) -> the command line within the inputs, with their tokenizer."""
    monkeypatch.chdir(inputs)

    def call(*options: object, name: str = "mine", tokenizer: object = "tiny-bert") -> list:
        return [prepare_pieces, name, "--tokenizer", tokenizer, *options]

    return call


def contents(folder: Path) -> list[list[int]]:
    return [np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "valid", "test")]


def joined(folder: Path) -> list[int]:
    return [piece for split in contents(folder) for piece in split]


# what is written


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.xz", "a.txt.gz", "crlf.txt", "a.jsonl", "a.parquet", "a.csv", "story.jsonl", "packed.jsonl.xz", "b[1].txt"]
)
def test_every_format_gives_the_pieces_of_the_tokenizer(name, run, argv, inputs, tokenizer):
    column = ["--column", "story"] if name == "story.jsonl" else []
    folder, err = run(*argv("--data_files", name, *column, "--title", "A text"))
    pieces, splits = expected(tokenizer, LINES), contents(folder)
    assert joined(folder) == pieces and pieces.count(SEP) > 20 and PIECES.index("##known") in pieces and 1 in pieces
    held = len(pieces) // 100
    assert list(map(len, splits)) == [len(pieces) - 2 * held, held, held] and held > 10
    source = f"{name} ({(inputs / name).stat().st_size:,} bytes)"
    assert err.splitlines()[-1] == f"prepared {folder}: A text, from {source}"
    corpus = Corpus.open(folder)
    corpus.verify()
    v = corpus.vocabulary
    assert corpus.unit == "pieces" and (v.name, v.size, v.pad, v.cls, v.sep, v.mask) == ("tiny-bert", len(PIECES), 0, 2, 3, 4)
    assert corpus.meta == {
        **{"schema": 1, "name": "mine", "title": "A text", "source": source, "limit": None, "official_text": False},
        **{"column": column[-1] if column else "text", "files": corpus.meta["files"]},
        **{name: corpus.meta[name] for name in ("splits", "vocabulary")},
    }
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "test.bin", "tokenizer", "train.bin", "valid.bin"]


def test_the_tokenizer_is_kept_beside_the_pieces_and_can_be_used_again(run, argv, tokenizer):
    folder, _ = run(*argv("--data_files", "a.txt"))
    kept = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert kept.get_vocab() == tokenizer.get_vocab() == {piece: index for index, piece in enumerate(PIECES)}
    again, _ = run(*argv("--data_files", "a.txt", name="again", tokenizer=folder / "tokenizer"))
    assert contents(again) == contents(folder)
    assert Corpus.open(again).vocabulary.sha256 == Corpus.open(folder).vocabulary.sha256


def test_several_files_are_joined_in_order(run, argv, tokenizer):
    folder, _ = run(*argv("--data_files", "a.txt.xz", "short.txt"))
    assert joined(folder) == expected(tokenizer, [*LINES, *["the router"] * 499])
    assert " + short.txt (" in Corpus.open(folder).meta["source"]


@pytest.mark.parametrize("ends", [[3, 6], [1, 2, 3, 4, 5, 6], [6]], ids=str)
def test_blank_lines_are_one_separator_wherever_a_batch_ends(ends, tokenizer):
    lines = ["", "the router", "", " ", "a model", ""]
    texts = [lines[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    the, router, a, model = (PIECES.index(word) for word in ("the", "router", "a", "model"))
    assert np.concatenate(list(prepare_pieces.tokenize(texts, tokenizer))).tolist() == [the, router, SEP, a, model, SEP]


def test_more_blank_lines_than_are_read_at_once(run, argv, tokenizer, tmp_path):
    (tmp_path / "gap.txt").write_text("\n".join([*LINES, *[""] * 2500, *LINES]) + "\n")
    folder, _ = run(*argv("--data_files", tmp_path / "gap.txt"))
    assert joined(folder) == expected(tokenizer, [*LINES, *[""] * 2500, *LINES])


@pytest.mark.parametrize(
    ("name", "special", "text", "wanted"),
    [
        ("bert-base-uncased", (30522, 101, 102, 103, 0), "Hello world", [7592, 2088]),
        ("roberta-base", (50265, 0, 2, 50264, 1), "Hello world", [31414, 232]),
    ],
)
def test_the_published_vocabularies(name, special, text, wanted, run, argv, tmp_path):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"{TOKENIZERS / name} is missing")
    (tmp_path / "text.txt").write_text(f"{text}\n" * 600)
    folder, _ = run(*argv("--data_files", tmp_path / "text.txt", tokenizer=TOKENIZERS / name))
    v = Corpus.open(folder).vocabulary
    assert (v.size, v.cls, v.sep, v.mask, v.pad) == special and v.name == name
    assert joined(folder) == wanted * 600


def test_a_limit_takes_the_first_pieces(run, refused, argv, tokenizer):
    folder, _ = run(*argv("--data_files", "a.txt", "--limit", 1100))
    assert joined(folder) == expected(tokenizer, LINES)[:1100]
    assert Corpus.open(folder).title == "mine, first 1,100 pieces"
    assert "has limit 1100, not 1200" in refused(*argv("--data_files", "a.txt", "--limit", 1200))
    assert "--limit 12 is too small: take at least 1,000 pieces" in refused(*argv("--data_files", "a.txt", "--limit", 12))


def test_a_prepared_text_is_recognised_by_its_settings(run, refused, argv, tmp_path):
    folder, _ = run(*argv("--data_files", "a.txt"))
    write_vocabulary(tmp_path / "other-bert")
    replace = ": choose another --out, or replace it with --force"
    for options, changes, fault in (
        (["a.txt", "--out", folder], {"name": "other"}, "mine has name 'mine', not 'other'"),
        (["short.txt"], {}, "bytes)', not 'short.txt (5,489 bytes)'"),
        (["a.txt"], {"tokenizer": tmp_path / "other-bert"}, "mine has tokenizer 'tiny-bert', not 'other-bert'"),
        (["a.txt", "--column", "body"], {}, "mine has column 'text', not 'body'"),
        (["a.txt", "--title", "T"], {}, "mine has title 'mine', not 'T'"),
    ):
        assert fault + replace in refused(*argv("--data_files", *options, **changes))


@pytest.mark.parametrize("change", ["changed", "more", "less"])
def test_a_tokenizer_that_is_no_longer_that_of_its_pieces_is_refused(change, run, refused, argv):
    """By what trains on the pieces, by what reads the tokenizer, and by the program itself."""
    folder, _ = run(*argv("--data_files", "a.txt"))
    file = folder / "tokenizer" / ("added_tokens.json" if change == "more" else "tokenizer.json")
    if change == "less":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"##s"', '"##t"') if file.exists() else "{}")
    for read in (Corpus.open(folder).verify, lambda: load_tokenizer(str(folder / "tokenizer"))):
        with pytest.raises(UserError, match=rf"{file.name}( is missing|, which meta\.json does not record| has sha256 ).*: prepare "):
            read()
    assert file.name in refused(*argv("--data_files", "a.txt"))


def test_a_text_of_an_older_version_is_read_with_a_note(run, argv, capsys):
    folder, _ = run(*argv("--data_files", "a.txt"))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({name: meta[name] for name in meta if name not in (*MARKS, "files")}))
    Corpus.open(folder).verify()
    assert capsys.readouterr().err.startswith(f"note: {folder / 'meta.json'} has no checksum, as in earlier versions")


def test_an_altered_piece_is_refused(run, argv):
    folder, _ = run(*argv("--data_files", "a.txt"))
    meta = json.loads((folder / "meta.json").read_text())
    meta["vocabulary"]["mask"] = 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.json is damaged: .*: prepare it again with `python data/prepare_pieces\.py"):
        Corpus.open(folder)


def test_what_may_change_on_the_hub_is_noted(refused, argv, capsys):
    for name, noted in (("nobody/nothing", True), (f"nobody/nothing@{'0' * 40}", False), ("bert-base-uncased", False)):
        assert f"--tokenizer {name} cannot be loaded (" in refused(*argv("--data_files", "a.txt", tokenizer=name))
        said = "note: --tokenizer nobody/nothing may change on the hub: nobody/nothing@COMMIT names one version of it\n"
        assert capsys.readouterr().err == (said if noted else "")


# refusals


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--data_files", "absent.txt"], "--data_files absent.txt is not a file: give "),
        (["--data_files", "tiny-bert"], "--data_files tiny-bert is not a file: give "),
        (["--data_files", "a.txt", "a.csv"], "--data_files a.txt and a.csv have different formats: give files of one format"),
        (["--data_files", "a.jsonl", "--column", "body"], "has no column 'body', but text, story, length: choose one with --column"),
        (["--data_files", "a.txt", "--column", "body"], "has no column 'body', but text: choose one with --column"),
        (["--data_files", "a.jsonl", "--column", "length"], "has 0 in the column 'length', not a text: choose another with --column"),
        ([], "give the text either with --data_files FILE... or with --hub DATASET"),
        (["--data_files", "a.txt", "--hub", "x/y"], "give the text either with --data_files FILE... or with --hub DATASET"),
        (["--data_files", "cut.txt.xz"], "cut.txt.xz ("),
        (["--data_files", "latin.txt"], "latin.txt ("),
        (["--data_files", "bad.jsonl"], "bad.jsonl (9 bytes) cannot be read ("),
        (["--data_files", "bad.parquet"], "bad.parquet (10 bytes) cannot be read ("),
        (["--data_files", "short.txt"], "short.txt (5,489 bytes) has 998 pieces: give at least 1,000"),
        (["--data_files", "empty.txt"], "empty.txt (0 bytes) "),
        (["--hub", "nobody/nothing"], "nobody/nothing cannot be read ("),
    ],
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_an_unusable_text_is_refused(options, fault, refused, argv):
    line = refused(*argv(*options))
    assert fault in line and len(line) < 500
    assert "cannot be read" not in line or line.endswith(
        (": give undamaged files", ": read files of your own with --data_files")[options[0] == "--hub"]
    )


SPECIAL = {"cls_token": "w0", "sep_token": "w1", "mask_token": "w2", "pad_token": "w3"}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nobody/nothing", "--tokenizer nobody/nothing cannot be loaded ("),
        ("empty", "empty has neither tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt"),
        ("plain", "plain has no cls, sep, mask, pad piece: choose one made for masked language modelling"),
        ("huge", "huge has 65,537 pieces, more than 65,536: choose one made for masked language modelling"),
        ("maskless", "maskless has no mask piece"),
    ],
)
def test_an_unusable_tokenizer_is_refused(name, fault, refused, argv, tmp_path):
    from tokenizers import Tokenizer, models

    if name == "empty":
        (tmp_path / name).mkdir()
    elif name == "maskless":
        write_vocabulary(tmp_path / name, tuple(piece for piece in PIECES if piece != "[MASK]"))
    elif name in ("plain", "huge"):
        made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10 if name == "plain" else 65_537)}, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL if name == "huge" else {}).save_pretrained(tmp_path / name)
    assert fault in refused(*argv("--data_files", "a.txt", tokenizer=name if "/" in name else tmp_path / name))
