"""utils/data/corpus.py refuses incomplete and damaged texts; the lanes equal a slow transcription and resume bit for bit."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.data.corpus import Corpus
from utils.data.lanes import LaneIterator, rank_lanes
from utils.errors import UserError

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
    (tmp_path / "file").write_bytes(b"x")
    for name in ("enwik8", "empty", "file"):
        with pytest.raises(UserError, match=rf"{name} is not a prepared text.*prepare.py {name}"):
            Corpus.open(tmp_path / name)
        with pytest.raises(UserError, match=rf"prepare one with `python data/prepare_pieces.py {name} --tokenizer T --data_files FILE`$"):
            Corpus.open(tmp_path / name, "pieces")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": 2}, "schema 2, this program reads schema 1"),
        ({"name": None}, "lacks the string 'name'"),
        ({"official_text": "no"}, "lacks the boolean 'official_text'"),
        ({"splits": []}, "'train'"),
        ({"splits": {"train": {"bytes": "9", "sha256": ""}}}, "'train'"),
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
    with pytest.raises(UserError, match=r"meta\.json is not .*--force"):
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
    lanes, expected = LaneIterator(data, batch_size, tgt_len), slow_lanes(data, batch_size, tgt_len)
    assert lanes.segments_per_epoch == len(expected)
    passes = [list(lanes.one_pass()), [next(lanes) for _ in expected], [next(lanes) for _ in expected]]
    assert (lanes.epoch, lanes.position) == (2, 0)
    for segments in passes:
        assert [(s.tokens.tolist(), s.targets.tolist()) for s in segments] == expected
        assert [s.first for s in segments] == [True] + [False] * (len(expected) - 1)
        assert all(t.dtype == torch.int64 and t.is_contiguous() and t.device.type == "cpu" for s in segments for t in s[:2])


def test_a_pass_reads_every_byte_of_every_lane_once():
    data = text(10 * 37 + 3)
    segments = list(LaneIterator(data, 10, 5).one_pass())
    read = torch.cat([s.tokens for s in segments] + [segments[-1].targets[:, -1:]], dim=1)
    assert np.array_equal(read.numpy().astype(np.uint8).ravel(), data[:370])  # the remaining 3 are in no lane


def test_training_is_endless_and_marks_each_epoch():
    lanes = LaneIterator(text(90), 3, 10)  # 30 bytes per lane: segments of 10, 10, 9
    segments = [next(lanes) for _ in range(7)]
    assert iter(lanes) is lanes
    assert [s.first for s in segments] == [True, False, False, True, False, False, True]
    assert [s.tokens.shape[1] for s in segments] == [10, 10, 9, 10, 10, 9, 10]
    assert torch.equal(segments[0].tokens, segments[3].tokens) and (lanes.epoch, lanes.position) == (2, 10)


def test_one_pass_changes_nothing():
    lanes = LaneIterator(text(90), 3, 10)
    next(lanes)
    before = lanes.state_dict()
    assert len(list(lanes.one_pass())) == 3 and lanes.state_dict() == before


def test_segments_own_their_memory():
    data = text(90)
    before = data.copy()
    next(LaneIterator(data, 3, 10)).tokens.zero_()
    assert np.array_equal(data, before)


def test_a_memory_mapped_split_works(tmp_path):
    corpus = Corpus.open(write_corpus(tmp_path / "c"))
    segment = next(LaneIterator(corpus.train, 4, 6, fingerprint=corpus.fingerprint))
    assert segment.tokens.tolist() == [list(range(6))] * 4 and segment.targets.tolist() == [list(range(1, 7))] * 4


@pytest.mark.parametrize("done", range(8))
def test_resume_is_bit_identical(done):
    data = text(200)
    whole, lanes = LaneIterator(data, 4, 16), LaneIterator(data, 4, 16, fingerprint="f")
    expected = [next(whole) for _ in range(15)]
    for _ in range(done):
        next(lanes)
    resumed = LaneIterator(data, 4, 16, fingerprint="f")
    resumed.load_state_dict(json.loads(json.dumps(lanes.state_dict())))
    for one in expected[done:]:
        other = next(resumed)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets) and one.first == other.first
    assert resumed.state_dict() == {**whole.state_dict(), "fingerprint": "f"}


def test_state_may_be_loaded_with_another_number_of_ranks():
    data = text(400)
    whole = LaneIterator(data, 8, 16)
    next(whole)
    half = LaneIterator(data, 8, 16, lanes=range(4, 8))
    half.load_state_dict(whole.state_dict())
    assert torch.equal(next(half).tokens, next(whole).tokens[4:])


@pytest.mark.parametrize(
    "other, message",
    [
        (LaneIterator(text(200), 5, 16), "--batch_size 4, this run has 5"),
        (LaneIterator(text(200), 4, 8), "--tgt_len 16, this run has 8"),
        (LaneIterator(text(201), 4, 16), "with 200 bytes of text, this run has 201"),
        (LaneIterator(text(200), 4, 16, fingerprint="g"), "the text f, this run has g"),
    ],
)
def test_the_state_of_another_run_is_refused(other, message):
    state = LaneIterator(text(200), 4, 16, fingerprint="f").state_dict()
    with pytest.raises(UserError, match=message):
        other.load_state_dict(state)
    assert (other.epoch, other.position) == (0, 0)


@pytest.mark.parametrize(
    "change", [{"position": 7}, {"position": 64}, {"position": -16}, {"position": None}, {"epoch": -1}, {"epoch": "1"}]
)
def test_a_damaged_state_is_refused(change):
    lanes = LaneIterator(text(200), 4, 16)
    with pytest.raises(UserError, match="damaged"):
        lanes.load_state_dict({**lanes.state_dict(), **change})
    with pytest.raises(UserError):
        lanes.load_state_dict({})


def test_a_split_that_is_too_short_is_refused_with_sizes_and_remedy():
    assert LaneIterator(text(10), 5, 4).segments_per_epoch == 1
    with pytest.raises(UserError, match=r"10 bytes is too short for --batch_size 6 .* use --batch_size 5 or smaller"):
        LaneIterator(text(10), 6, 4)
    with pytest.raises(UserError, match="use a longer text"):
        LaneIterator(text(1), 1, 4)


@pytest.mark.parametrize("batch_size, tgt_len", [(0, 4), (4, 0), (-1, 4)])
def test_sizes_must_be_positive(batch_size, tgt_len):
    with pytest.raises(UserError, match=f"--batch_size {batch_size} and --tgt_len {tgt_len}"):
        LaneIterator(text(100), batch_size, tgt_len)


def test_programming_mistakes_are_value_errors():
    for make in (
        lambda: LaneIterator(text(100).astype(np.int64), 4, 4),
        lambda: LaneIterator(text(100).reshape(2, 50), 4, 4),
        lambda: LaneIterator(text(100), 4, 4, lanes=range(2, 5)),
        lambda: LaneIterator(text(100), 4, 4, lanes=range(0, 4, 2)),
        lambda: rank_lanes(4, 2, 2),
        lambda: rank_lanes(4, -1, 2),
    ):
        with pytest.raises(ValueError):
            make()


# ranks


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (22, 4), (22, 8), (8, 8), (7, 3), (64, 5)])
def test_rank_lanes_cover_all_lanes_evenly(batch_size, world_size):
    ranges = [rank_lanes(batch_size, rank, world_size) for rank in range(world_size)]
    assert [lane for lanes in ranges for lane in lanes] == list(range(batch_size))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_ranks_together_read_what_one_process_reads():
    data = text(500)
    ranks = [LaneIterator(data, 7, 9, lanes=rank_lanes(7, rank, 3)) for rank in range(3)]
    for whole in LaneIterator(data, 7, 9).one_pass():
        parts = [next(rank) for rank in ranks]
        assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts])) and {p.first for p in parts} == {whole.first}


def test_fewer_lanes_than_ranks_is_for_evaluation_only():
    with pytest.raises(UserError, match="--batch_size 2 is less than the 3 processes"):
        rank_lanes(2, 0, 3)
    ranges = [rank_lanes(2, rank, 3, training=False) for rank in range(3)]
    assert sorted(map(len, ranges)) == [0, 1, 1]
    idle = LaneIterator(text(40), 2, 5, lanes=ranges[0])
    assert len(list(idle.one_pass())) == idle.segments_per_epoch and next(idle).tokens.shape == (0, 5)
