"""Tests on corrupted input: what is replaced, and that only the input is."""

import numpy as np
import pytest

from tests import tiny
from utils.data.attack import Attack, attack_of
from utils.data.corpus import Corpus
from utils.data.lanes import Lanes
from utils.engine import Engine
from utils.reporting.__main__ import main as report
from utils.reporting.records import read_record
from utils.tasks.causal import TokenSequences
from utils.tasks.masked import MaskedSequences
from utils.training.setup import pretraining_task


def test_the_rate_is_kept_and_special_symbols_stay():
    symbols = np.arange(40_000, dtype="<u2") % 20
    for attack in (Attack(0.1, 7, 20, [0, 3, 19]), Attack(0.1, None, 20, [0, 3, 19])):
        found = attack(symbols)
        changed = found != symbols
        assert found.dtype == symbols.dtype and np.array_equal(found, attack(symbols)) and not np.array_equal(found, attack(symbols, 1))
        assert not changed[np.isin(symbols, [0, 3, 19])].any()
        ordinary = ~np.isin(symbols, [0, 3, 19])
        expected = 0.1 * (16 / 17)  # a symbol may be drawn in its own place, or be the generic one
        assert abs(changed[ordinary].mean() - expected) < 0.006
        drawn = {*found[changed].tolist()}
        assert drawn == ({7} if attack.generic is not None else {*range(20)} - {0, 3, 19})
    counts = np.bincount(Attack(1.0, None, 20, [0, 3, 19])(symbols)[ordinary], minlength=20)
    assert counts[[0, 3, 19]].sum() == 0 and counts[counts > 0].max() / counts[counts > 0].min() < 1.15


def test_targets_are_the_true_symbols():
    text = np.arange(600) % 23 + 5
    read = Attack(0.3, 4, 40, [])(text)
    assert 100 < (read != text).sum() < 250
    clean, attacked = Lanes(text, 3, 10), Lanes(text, 3, 10, read=read)
    for index in range(len(clean)):
        (tokens, targets), (corrupted, same) = clean[index], attacked[index]
        assert np.array_equal(targets, same) and (tokens != corrupted).any()
        assert set(corrupted[tokens != corrupted].tolist()) == {4}
    tokens, targets = TokenSequences(text, 10, None, read).batch(np.arange(5), (), "cpu")
    assert tokens.flatten().tolist() == read[:50].tolist() and targets.flatten().tolist() == text[1:51].tolist()
    pieces = type("V", (), {**tiny.SPECIAL["bert"], "size": 40, "special": sorted(tiny.SPECIAL["bert"].values())})
    one, other = (MaskedSequences(text, pieces, 22, 0.3, part).batch(np.arange(8), (1,), "cpu") for part in (None, read))
    assert np.array_equal(one[1], other[1]) and np.array_equal(one[2], other[2]) and (one[0] != other[0]).any()
    masked = one[0] == tiny.SPECIAL["bert"]["mask"]
    assert np.array_equal(masked, (other[0] == tiny.SPECIAL["bert"]["mask"]) & masked) and masked.any()


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_special_pieces_are_never_drawn(tmp_path, model):
    corpus = Corpus.open(tiny.write_pieces(tmp_path / "pieces", model))
    flags = tiny.parse(
        tiny.flags(corpus.path, tmp_path / "run", model=model, method="dense", attack="random", attack_rate=0.9, **tiny.ENCODER)
    )
    found = attack_of(flags.attack, flags.attack_rate, corpus.vocabulary, corpus.path)(np.full(5_000, 20, "<u2"))
    assert not np.isin(found, corpus.vocabulary.special).any() and len({*found.tolist()}) == 36


def test_a_run_on_bytes_has_a_column_of_noise(tmp_path, capsys):
    data = tiny.write_corpus(tmp_path / "text")
    for method in ("dense", "smoe"):
        tiny.completed(tiny.flags(data, tmp_path / "runs" / method, method=method, attack="random", attack_rate=0.2, max_step=8))
    tiny.completed(tiny.flags(data, tmp_path / "runs" / "smoe_dropout", method="smoe_dropout", max_step=8))
    rows = read_record(tmp_path / "runs" / "smoe" / "result.json")["quality"]
    assert all(row["test_attacked"] > row["test"] for row in rows)
    flags = tiny.parse(tiny.flags(data, tmp_path / "runs" / "smoe", method="smoe", attack="random", attack_rate=0.2, max_step=8))
    with Engine(flags) as engine:
        task = pretraining_task(flags, Corpus.open(data), engine)
        clean, noisy = (next(task.held_out("test", attacked=attacked)).inputs for attacked in (False, True))
    assert (clean[0] != noisy[0]).any() and (clean[1] == noisy[1]).all()
    report(["table1", "--runs", str(tmp_path / "runs")])
    table = capsys.readouterr().out
    lines = {
        line.split("|")[1].split(" (n =")[0].split(",")[0].strip(): line.split("|") for line in table.splitlines() if line.startswith("|")
    }
    place = next(index for index, title in enumerate(lines[next(iter(lines))]) if "20 % random symbols, k = E/2" in title)
    assert lines["Dense"][place].strip() == "–" and lines["Dense"][place + 1].strip(" *") != "–"
    assert lines["SMoE (learned router)"][place].strip(" *") == f"{rows[1]['test_attacked']:.3f}"
    assert lines["SMoE-Dropout"][place].strip() == lines["SMoE-Dropout"][place + 1].strip() == "–"
