"""utils/data/corpus.py refuses incomplete and damaged texts; the lanes equal a slow transcription and resume bit for bit."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import ALONE
from utils.data.corpus import Corpus
from utils.data.lanes import Lanes, rank_lanes
from utils.errors import UserError
from utils.flags.fields import Flags
from utils.tasks.language_modelling import LanguageModelling

SPLITS = {"train": bytes(range(256)) * 4, "valid": b"valid" * 11, "test": b"test" * 7}


def write_corpus(folder: Path, splits: dict[str, bytes] = SPLITS) -> Path:
    folder.mkdir(exist_ok=True)
    entries = {}
    for split, content in splits.items():
        (folder / f"{split}.bin").write_bytes(content)
        entries[split] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    meta = {"schema": 1, "name": "mine", "title": "Mine", "source": "x", "official_text": False, "splits": entries, "symbols": 256}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def change_meta(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def text(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def slow_lanes(data: np.ndarray, batch_size: int, tgt_len: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Do what Transformer-XL's LMOrderedIterator does, byte by byte."""
    n_step = len(data) // batch_size
    segments = []
    for i in range(0, n_step - 1, tgt_len):
        length = min(tgt_len, n_step - 1 - i)
        tokens = [[int(data[b * n_step + i + t]) for t in range(length)] for b in range(batch_size)]
        targets = [[int(data[b * n_step + i + 1 + t]) for t in range(length)] for b in range(batch_size)]
        segments.append((tokens, targets))
    return segments


# Corpus


def test_a_corpus_holds_the_bytes_read_only(tmp_path):
    corpus = Corpus.open(str(write_corpus(tmp_path / "c")))
    assert (corpus.name, corpus.title, corpus.unit, corpus.vocabulary) == ("mine", "Mine", "bytes", None)
    for split, content in SPLITS.items():
        array = getattr(corpus, split)
        assert array.dtype == np.uint8 and array.tobytes() == content and not array.flags.writeable
    corpus.verify()


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    one, same = (Corpus.open(write_corpus(tmp_path / name)) for name in ("a", "b"))
    swapped = Corpus.open(write_corpus(tmp_path / "c", {**SPLITS, "valid": SPLITS["test"], "test": SPLITS["valid"]}))
    hashes = [hashlib.sha256(SPLITS[split]).hexdigest() for split in ("train", "valid", "test")]
    assert one.fingerprint == same.fingerprint == hashlib.sha256("".join(hashes).encode()).hexdigest() != swapped.fingerprint


@pytest.mark.parametrize(
    "content, found", [(b"vali", "has 4 bytes"), (b"v" * 56, "has 56 bytes"), (b"", "has 0 bytes"), (None, "is missing")]
)
def test_a_split_of_another_size_is_refused(tmp_path, content, found):
    folder = write_corpus(tmp_path / "c")
    path = folder / "valid.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Corpus.open(folder)
    remedy = "prepare it again with `python data/prepare.py mine --source FILE --force`"
    assert str(caught.value) == f"{path} {found}, meta.json says 55 bytes: {remedy}"


def test_a_missing_text_is_refused_with_the_command_that_prepares_it(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("enwik8", "empty"):
        with pytest.raises(UserError, match=rf"{name} is not a prepared text.*prepare.py {name}"):
            Corpus.open(tmp_path / name)
        with pytest.raises(UserError, match=rf"prepare one with `python data/prepare_pieces.py {name} --tokenizer T --data_files FILE`$"):
            Corpus.open(tmp_path / name, ("pieces",))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=r"file is a file: prepare it with `python data/prepare.py NAME"):
        Corpus.open(tmp_path / "file")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": 2}, "'schema' must be int <= 1"),
        ({"name": None}, "'name' must be str, got null"),
        ({"official_text": "no"}, "'official_text' must be bool"),
        ({"splits": []}, "'splits' must be object"),
        ({"splits": {"train": {"bytes": 9, "sha256": ""}}}, "'splits.train.sha256' must be str matching regex"),
    ],
)
def test_a_meta_of_another_kind_is_refused(tmp_path, change, message):
    change_meta(write_corpus(tmp_path / "c"), **change)
    with pytest.raises(UserError, match=message):
        Corpus.open(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b'{"schema": 1', b"[1]", b"\xff\xfe"])
def test_a_damaged_meta_is_refused(tmp_path, content):
    path = write_corpus(tmp_path / "c") / "meta.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json is .*--force"):
        Corpus.open(tmp_path / "c")


def test_verify_finds_one_changed_byte(tmp_path):
    folder = write_corpus(tmp_path / "c")
    (folder / "test.bin").write_bytes(b"Test" + SPLITS["test"][4:])
    corpus = Corpus.open(folder)  # the cheap check sees sizes only
    with pytest.raises(UserError, match=r"test\.bin has sha256"):
        corpus.verify()


def test_opening_a_corpus_does_not_import_torch(tmp_path):
    folder = write_corpus(tmp_path / "c")
    code = f"import sys; from utils.data.corpus import Corpus; Corpus.open({str(folder)!r}).verify(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# lanes


@pytest.mark.parametrize(
    "size, batch_size, tgt_len", [(100, 4, 7), (103, 4, 8), (97, 1, 10), (50, 5, 100), (8, 4, 3), (68, 4, 8), (1000, 22, 16)]
)
def test_lanes_equal_a_slow_transcription(size, batch_size, tgt_len):
    data = text(size)
    lanes, expected = Lanes(data, batch_size, tgt_len), slow_lanes(data, batch_size, tgt_len)
    segments = [lanes[index] for index in range(len(lanes))]
    assert [(tokens.tolist(), targets.tolist()) for tokens, targets in segments] == expected
    assert all(t.dtype == torch.int64 and t.is_contiguous() and t.device.type == "cpu" for segment in segments for t in segment)


def test_a_pass_reads_every_byte_of_every_lane_once():
    data = text(10 * 37 + 3)
    segments = list(Lanes(data, 10, 5))
    read = torch.cat([tokens for tokens, _ in segments] + [segments[-1][1][:, -1:]], dim=1)
    assert np.array_equal(read.numpy().astype(np.uint8).ravel(), data[:370])  # the remaining 3 are in no lane


def test_segments_own_their_memory():
    data = text(90)
    before = data.copy()
    Lanes(data, 3, 10)[0][0].zero_()
    assert np.array_equal(data, before)


def test_a_memory_mapped_split_works(tmp_path):
    corpus = Corpus.open(write_corpus(tmp_path / "c"))
    tokens, targets = Lanes(corpus.train, 4, 6)[0]
    assert tokens.tolist() == [list(range(6))] * 4 and targets.tolist() == [list(range(1, 7))] * 4


def test_a_split_that_is_too_short_is_refused_with_sizes_and_remedy():
    assert len(Lanes(text(10), 5, 4)) == 1
    with pytest.raises(UserError, match=r"10 symbols is too short for --batch_size 6 .* use --batch_size 5 or smaller"):
        Lanes(text(10), 6, 4)
    with pytest.raises(UserError, match="use a longer text"):
        Lanes(text(1), 1, 4)


def reader(tmp_path: Path) -> LanguageModelling:
    """Language modelling over 90 bytes in 3 lanes, 10 at a time: segments of 10, 10 and 9 bytes."""
    corpus = Corpus.open(write_corpus(tmp_path / "c", {split: bytes(text(90)) for split in SPLITS}))
    return LanguageModelling(Flags(batch_size=3, tgt_len=10, eval_batch_size=3, eval_tgt_len=10), corpus, ALONE)


def test_training_is_endless_and_marks_each_epoch(tmp_path):
    task = reader(tmp_path)
    batches = [task.next() for _ in range(7)]
    assert [batch.first for batch in batches] == [True, False, False, True, False, False, True]
    assert [batch.inputs[0].shape[1] for batch in batches] == [10, 10, 9, 10, 10, 9, 10]
    assert torch.equal(batches[0].inputs[0], batches[3].inputs[0])


def test_an_evaluation_changes_nothing_in_training(tmp_path):
    task = reader(tmp_path)
    task.next()
    before = task.state_dict()
    assert len(list(task.held_out("valid"))) == 3 and task.state_dict() == before


@pytest.mark.parametrize("done", range(5))
def test_resume_is_bit_identical(done, tmp_path):
    whole, resumed = reader(tmp_path), reader(tmp_path)
    batches = [whole.next() for _ in range(8)]
    resumed.load_state_dict(whole.state_dict() | {"step": done})
    for one in batches[done:]:
        other = resumed.next()
        assert all(map(torch.equal, one.inputs, other.inputs)) and one.first == other.first


def test_the_state_of_another_text_is_refused(tmp_path):
    task = reader(tmp_path)
    with pytest.raises(UserError, match="other data"):
        task.load_state_dict(task.state_dict() | {"fingerprint": "other"})


# ranks


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (22, 4), (22, 8), (8, 8), (7, 3), (64, 5)])
def test_rank_lanes_cover_all_lanes_evenly(batch_size, world_size):
    ranges = [rank_lanes(batch_size, rank, world_size) for rank in range(world_size)]
    assert [lane for lanes in ranges for lane in lanes] == list(range(batch_size))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_all_ranks_read_the_data_of_one_process():
    data = text(500)
    ranks = [Lanes(data, 7, 9, lanes=rank_lanes(7, rank, 3)) for rank in range(3)]
    for whole, *parts in zip(Lanes(data, 7, 9), *ranks, strict=True):
        for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together, torch.cat(pieces))


def test_fewer_lanes_than_ranks_is_for_evaluation_only():
    with pytest.raises(UserError, match="--batch_size 2 is less than the 3 processes"):
        rank_lanes(2, 0, 3)
    ranges = [rank_lanes(2, rank, 3, training=False) for rank in range(3)]
    assert sorted(map(len, ranges)) == [0, 1, 1]
    idle = Lanes(text(40), 2, 5, lanes=ranges[0])
    assert len(list(idle)) == len(idle) and idle[0][0].shape == (0, 5)
