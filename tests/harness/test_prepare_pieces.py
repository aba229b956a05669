"""data/prepare_pieces.py: the pieces it writes, what it refuses, and that it leaves nothing half done."""

import gzip
import importlib.util
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.tiny import WORDS
from utils.data.corpus import Corpus
from utils.errors import UserError, run_main

transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("datasets")

SCRIPT = ROOT / "data" / "prepare_pieces.py"
spec = importlib.util.spec_from_file_location("prepare_pieces_script", SCRIPT)
script = sys.modules["prepare_pieces_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##er", "un", "##known", ".", ",")
SEP = PIECES.index("[SEP]")
TOKENIZERS = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT) / "data" / "tokenizers"


def written_text() -> list[str]:
    """Lines of known and unknown words; some are blank, at the beginning too, and some of blanks."""
    draw = random.Random(1)
    words = (*WORDS, "routers", "Tokens,", "unknown", "xyz.")
    return ["", *(["", " ", "\t"][i % 3] if i % 9 == 4 else " ".join(draw.choices(words, k=draw.randrange(1, 12))) for i in range(300)), ""]


LINES = written_text()


@pytest.fixture(scope="module", autouse=True)
def offline():
    """The hub is not asked for what is not here."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tokenizer, and the text in every format."""
    folder = tmp_path_factory.mktemp("inputs")
    write_vocabulary(folder / "tiny-bert")
    plain = "\n".join(LINES).encode() + b"\n"
    rows = [{"text": line, "story": line[::-1], "length": len(line)} for line in LINES]
    contents = {
        "a.txt": plain,
        "a.txt.xz": lzma.compress(plain),
        "a.txt.gz": gzip.compress(plain),
        "crlf.txt": plain.replace(b"\n", b"\r\n"),
    }
    contents["a.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents["story.jsonl"] = "".join(json.dumps({"text": "no", "story": row["text"] or None}) + "\n" for row in rows).encode()
    contents |= {
        "cut.txt.xz": contents["a.txt.xz"][:-30],
        "latin.txt": plain + b"\xe9",
        "short.txt": b"the router\n" * 499,
        "empty.txt": b"",
    }
    contents |= {"packed.jsonl.xz": lzma.compress(contents["a.jsonl"]), "b[1].txt": plain}  # the second as a glob: b1.txt
    contents |= {"bad.jsonl": b"{no json\n", "bad.parquet": b"no parquet"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    import pyarrow
    from pyarrow import csv, parquet

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
    """Made as transformers would have it made, without the program."""
    return transformers.BertTokenizerFast(vocab=str(inputs / "tiny-bert" / "vocab.txt"))


def expected(tokenizer, lines: list[str]) -> list[int]:
    """Every line by itself, and one separator for any blank lines between two that are not."""
    pieces, apart = [], True
    for line in lines:
        if line.strip():
            pieces += tokenizer(line, add_special_tokens=False)["input_ids"]
        elif not apart:
            pieces.append(SEP)
        apart = not line.strip()
    return pieces


@pytest.fixture
def run(inputs, tmp_path, capsys, monkeypatch):
    """run(*argv) -> (the folder named on the last line of stdout, stderr); within the inputs, with their tokenizer."""
    monkeypatch.chdir(inputs)

    def call(*argv: object, name: str = "mine", tokenizer: object = "tiny-bert", out: Path | None = None) -> tuple[Path, str]:
        words = [name, "--tokenizer", tokenizer, *argv, "--out", out or tmp_path / "out"]
        assert script.main(list(map(str, words))) == 0
        printed, err = capsys.readouterr()
        return Path(printed.splitlines()[-1]), err

    return call


def contents(folder: Path) -> list[list[int]]:
    return [np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "valid", "test")]


def joined(folder: Path) -> list[int]:
    return [piece for split in contents(folder) for piece in split]


def refused(run, capsys, tmp_path: Path, *argv: object, **kwargs: object) -> str:
    """The one line that the command ends with; its exit code is 2, and the folder is as it was."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(*argv, **kwargs) and None)
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert stop.value.code == 2 and out == "" and last.startswith("error: ") and "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    return last


# what is written


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.xz", "a.txt.gz", "crlf.txt", "a.jsonl", "a.parquet", "a.csv", "story.jsonl", "packed.jsonl.xz", "b[1].txt"]
)
def test_every_format_gives_the_tokenizers_own_pieces(name, run, inputs, tokenizer, tmp_path):
    folder, err = run("--data_files", name, *(["--column", "story"] if name == "story.jsonl" else []), "--title", "A text")
    pieces, splits = expected(tokenizer, LINES), contents(folder)
    assert joined(folder) == pieces and pieces.count(SEP) > 20 and PIECES.index("##known") in pieces and 1 in pieces
    held = len(pieces) // 100
    assert list(map(len, splits)) == [len(pieces) - 2 * held, held, held] and held > 10
    size = (inputs / name).stat().st_size
    assert err.splitlines()[-1] == f"prepared {folder} from {name} ({size:,} bytes)"
    corpus = Corpus.open(folder)
    corpus.verify()
    kept = {key: corpus.meta[key] for key in ("schema", "name", "title", "source", "official_text")}
    assert kept == {"schema": 1, "name": "mine", "title": "A text", "source": f"{name} ({size:,} bytes)", "official_text": False}
    v = corpus.vocabulary
    assert (v.name, v.size, v.pad, v.cls, v.sep, v.mask) == ("tiny-bert", len(PIECES), 0, 2, 3, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "test.bin", "tokenizer", "train.bin", "valid.bin"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_tokenizer_is_kept_beside_the_pieces_and_can_be_used_again(run, tokenizer, tmp_path):
    folder, _ = run("--data_files", "a.txt")
    kept = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert kept.get_vocab() == tokenizer.get_vocab() == {piece: index for index, piece in enumerate(PIECES)}
    again, _ = run("--data_files", "a.txt", tokenizer=folder / "tokenizer", out=tmp_path / "again")
    assert contents(again) == contents(folder)
    assert Corpus.open(again).vocabulary.sha256 == Corpus.open(folder).vocabulary.sha256


def test_several_files_are_joined_in_order(run, tokenizer):
    folder, _ = run("--data_files", "a.txt.xz", "short.txt")
    both = expected(tokenizer, [*LINES, *["the router"] * 499])
    assert joined(folder) == both and " + short.txt (" in Corpus.open(folder).meta["source"]


@pytest.mark.parametrize("ends", [[3, 6], [1, 2, 3, 4, 5, 6], [6]], ids=str)
def test_blank_lines_are_one_separator_wherever_the_text_is_cut(ends, tokenizer):
    lines = ["", "the router", "", " ", "a model", ""]
    texts = [lines[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    the, router, a, model = (PIECES.index(word) for word in ("the", "router", "a", "model"))
    assert np.concatenate(list(script.pieces(texts, tokenizer))).tolist() == [the, router, SEP, a, model, SEP]


def test_more_blank_lines_than_are_read_at_once(run, tokenizer, inputs, tmp_path):
    (tmp_path / "gap.txt").write_text("\n".join([*LINES, *[""] * 2500, *LINES]) + "\n")
    folder, _ = run("--data_files", tmp_path / "gap.txt")
    assert joined(folder) == expected(tokenizer, [*LINES, *[""] * 2500, *LINES])


@pytest.mark.parametrize(
    ("name", "special", "text", "wanted"),
    [
        ("bert-base-uncased", (30522, 101, 102, 103, 0), "Hello world", [7592, 2088]),
        ("roberta-base", (50265, 0, 2, 50264, 1), "Hello world", [31414, 232]),
    ],
)
def test_the_real_vocabularies(name, special, text, wanted, run, tmp_path):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"{TOKENIZERS / name} is not there")
    (tmp_path / "text.txt").write_text(f"{text}\n" * 600)
    folder, _ = run("--data_files", tmp_path / "text.txt", tokenizer=TOKENIZERS / name)
    v = Corpus.open(folder).vocabulary
    assert (v.size, v.cls, v.sep, v.mask, v.pad) == special and v.name == name
    assert joined(folder) == wanted * 600


# refusals


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data_files", "absent.txt"], "--data_files absent.txt is not a file"),
        (["--data_files", "tiny-bert"], "--data_files tiny-bert is not a file"),
        (["--data_files", "a.jsonl", "--column", "body"], "has no column 'body', but text, story, length: name one with --column"),
        (["--data_files", "a.txt", "--column", "body"], "has no column 'body', but text: name one with --column"),
        (["--data_files", "a.jsonl", "--column", "length"], "'length'"),  # numbers
        ([], "give the text either by --data_files FILE... or by --hub DATASET"),
        (["--data_files", "a.txt", "--hub", "x/y"], "give the text either by --data_files FILE... or by --hub DATASET"),
        (["--data_files", "cut.txt.xz"], "cut.txt.xz ("),
        (["--data_files", "latin.txt"], "latin.txt ("),
        (["--data_files", "bad.jsonl"], "bad.jsonl (9 bytes) cannot be read: "),
        (["--data_files", "bad.parquet"], "bad.parquet (10 bytes) cannot be read: "),
        (["--data_files", "short.txt"], "short.txt (5,489 bytes) gives 998 pieces: at least 1,000 are needed"),
        (["--data_files", "empty.txt"], "empty.txt (0 bytes) "),
        (["--hub", "nobody/nothing"], "nobody/nothing cannot be read: "),
    ],
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_a_text_that_cannot_be_had_is_refused(argv, said, run, capsys, tmp_path):
    line = refused(run, capsys, tmp_path, *argv)
    assert said in line and len(line) < 500
    if "--hub" in argv and len(argv) == 2:
        assert "--data_files reads files of your own" in line


SPECIAL = {"cls_token": "w0", "sep_token": "w1", "mask_token": "w2", "pad_token": "w3"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody/nothing", "--tokenizer nobody/nothing cannot be loaded: "),
        ("empty", "empty has neither tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt"),
        ("plain", "plain has no cls, sep, mask, pad piece: choose one made for masked language modelling"),
        ("huge", "huge has 65,537 pieces, more than 65,536: choose one made for masked language modelling"),
        ("maskless", "maskless has no mask piece"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_or_used_is_refused(name, said, run, capsys, tmp_path):
    from tokenizers import Tokenizer, models

    if name == "empty":
        (tmp_path / name).mkdir()
    elif name == "maskless":
        write_vocabulary(tmp_path / name, tuple(piece for piece in PIECES if piece != "[MASK]"))
    elif name in ("plain", "huge"):
        made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10 if name == "plain" else 65_537)}, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL if name == "huge" else {}).save_pretrained(tmp_path / name)
    assert said in refused(run, capsys, tmp_path, "--data_files", "a.txt", tokenizer=name if "/" in name else tmp_path / name)


def test_names_that_are_no_folders(run, capsys, tmp_path):
    for name in ("../up", "a/b", ".hidden", ""):
        assert "cannot be that of a folder" in refused(run, capsys, tmp_path, "--data_files", "a.txt", name=name)


# folders that are there


def test_a_prepared_folder_is_left_alone_and_another_content_refused(run, capsys, tmp_path, inputs, monkeypatch):
    folder, _ = run("--data_files", "a.txt")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_tokenizer", None)
        patch.setattr(script, "lines", None)
        assert run("--data_files", "a.txt") == (folder, f"already prepared: {folder}\n")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    write_vocabulary(tmp_path / "other-bert")
    choose = ": choose another --out, or replace it with --force"
    for argv, changes, said in (
        (["a.txt"], {"name": "other"}, f"out has name 'mine', not 'other'{choose}"),
        (["short.txt"], {}, "bytes)', not 'short.txt (5,489 bytes)'" + choose),
        (["a.txt"], {"tokenizer": tmp_path / "other-bert"}, f"out has tokenizer 'tiny-bert', not 'other-bert'{choose}"),
    ):
        assert said in refused(run, capsys, tmp_path, "--data_files", *argv, **changes)
    run("--data_files", "a.txt", "short.txt", "--force", name="other")
    assert Corpus.open(folder).name == "other" and len(Corpus.open(folder).train) > 1998
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-bert", "out"]


def test_force_never_removes_what_is_no_prepared_text(run, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "is there and no prepared text" in refused(run, capsys, tmp_path, "--data_files", "a.txt", "--force")


def test_the_first_pieces(run, tokenizer, capsys, tmp_path):
    folder, _ = run("--data_files", "a.txt", "--limit", 1100)
    assert joined(folder) == expected(tokenizer, LINES)[:1100]
    assert Corpus.open(folder).title == "mine, first 1,100 pieces"
    assert "has limit 1100, not 1200" in refused(run, capsys, tmp_path, "--data_files", "a.txt", "--limit", 1200)
    assert "--limit 12 is too few" in refused(run, capsys, tmp_path, "--data_files", "a.txt", "--limit", 12)


def test_a_damaged_folder_is_refused_and_mended_by_force(run, capsys, tmp_path):
    folder, _ = run("--data_files", "a.txt")
    whole = contents(folder)
    os.truncate(folder / "train.bin", 100)
    assert "train.bin has 100 bytes, meta.json says" in refused(run, capsys, tmp_path, "--data_files", "a.txt")
    run("--data_files", "a.txt", "--force")
    assert contents(folder) == whole


def test_a_folder_of_something_else_is_not_touched(run, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("keep")
    (tmp_path / "file").write_text("keep")
    assert "out is there and no prepared text" in refused(run, capsys, tmp_path, "--data_files", "a.txt")
    assert "file is there and no prepared text" in refused(run, capsys, tmp_path, "--data_files", "a.txt", "--force", out=tmp_path / "file")
    assert "file" in refused(run, capsys, tmp_path, "--data_files", "a.txt", out=tmp_path / "file" / "out")


# interruptions


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("failing", ["write_pieces", "write_split", "write_synced", "sync_folder"])
def test_an_interrupted_run_leaves_what_was_there(failing, force, run, tmp_path, monkeypatch):
    if force:
        run("--data_files", "short.txt", "a.txt")
    before = contents(tmp_path / "out") if force else None

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--data_files", "a.txt", *["--force"] * force)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * force
    if force:
        assert contents(tmp_path / "out") == before and Corpus.open(tmp_path / "out").verify() is None


def test_a_full_disk_is_said(run, capsys, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1000))
        assert "MB are needed" in refused(run, capsys, tmp_path, "--data_files", "a.txt")

    def full(*args):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(os, "fsync", full)
    assert "x: No space left on device" in refused(run, capsys, tmp_path, "--data_files", "a.txt")


def test_a_terminated_process_leaves_nothing(inputs, tmp_path):
    """The command itself, while it writes pieces."""
    (tmp_path / "long.txt").write_text("the frozen router sends each token to more experts\n" * 200_000)
    argv = ["mine", "--tokenizer", str(inputs / "tiny-bert"), "--data_files", "long.txt", "--out", "out"]
    command = subprocess.Popen([sys.executable, str(SCRIPT), *argv], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not any(path.stat().st_size for path in tmp_path.glob(".out.*.tmp/whole")):
        assert command.poll() is None and time.monotonic() < end, command.communicate()
        time.sleep(0.005)
    command.send_signal(signal.SIGTERM)
    assert "Traceback" not in command.communicate()[1] and command.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_what_a_killed_process_leaves_is_no_prepared_text(run, tmp_path, monkeypatch):
    """Killed at once, it cannot clean up: the folder in the making stays, under a name that nobody takes for a text."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_synced", killed)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            run("--data_files", "a.txt")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and any(left.iterdir()) and not (left / "meta.json").exists()
    Corpus.open(run("--data_files", "a.txt")[0]).verify()


def test_the_command_itself(inputs, tmp_path):
    """A refusal and a second run need neither transformers nor datasets, so that they are there at once."""
    code = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: " + (
        "sys.exit('slow') if {'torch', 'transformers', 'datasets'} & sys.modules.keys() else None"
    )

    def command(*argv: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=inputs, capture_output=True, text=True, check=False)

    done = command("mine", "--tokenizer", "tiny-bert", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and done.stderr.startswith("error: give the text either")
    from tests.tiny import write_pieces

    meta = write_pieces(tmp_path / "out") / "meta.json"
    known = json.loads(meta.read_text()) | {"name": "mine", "source": f"a.txt ({(inputs / 'a.txt').stat().st_size:,} bytes)"}
    known |= {"column": "text", "limit": None}
    known["vocabulary"]["name"] = "tiny-bert"
    meta.write_text(json.dumps(known))
    again = command("mine", "--tokenizer", "tiny-bert", "--data_files", "a.txt", "--out", tmp_path / "out")
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{tmp_path / 'out'}\n", f"already prepared: {tmp_path / 'out'}\n")


def test_refusals_raise_the_error_of_a_mistake_in_the_input(run):
    with pytest.raises(UserError):
        run("--data_files", "absent.txt")
