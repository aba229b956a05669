"""Tables and figures from records with known numbers."""

import json
import os
from pathlib import Path

import pytest

from utils import documents
from utils.errors import UserError, run_main
from utils.formatting import short_number
from utils.reporting.__main__ import main
from utils.reporting.groups import method_groups
from utils.reporting.labels import phrases
from utils.reporting.published import SHARES, elsewhere
from utils.reporting.records import PUBLISHED, read_record
from utils.reporting.tables import DASH

CONSTANT_K = 8


def record(method="smoe_dropout", seed=1, quality=None, experts=16, seconds=100.0, **changes):
    """A complete record; `quality` maps k (None: dense) to the test value. Names with __ in `changes` overwrite single fields."""
    quality = quality or {1: 7.5, 2: 5.5, 4: 3.7, 8: 2.7, 16: 2.4}
    sparse = None not in quality
    entries = [
        {"k": k, "valid": v, "test": v, "active_parameters": 1_000_000 + 100_000 * (k or 16), "flops_per_token": 2_000_000 * (k or 16)}
        for k, v in quality.items()
    ]
    key = str(experts) if sparse else "dense"
    made = {
        "schema": 2,
        "table": "table1",
        "method": method,
        "settings": {},
        "sparse": sparse,
        "preset": "laptop",
        "preset_settings": {},
        "dataset": {"name": "enwik8-prefix", "title": "enwik8 prefix, 4.15 MB", "fingerprint": "f"},
        "metric": {"name": "bpc", "lower_is_better": True, "split": "test", "training": "bpc"},
        "seed": seed,
        "status": "complete",
        "model": {"architecture": "transformer_xl", "num_experts": experts if sparse else None},
        "parameters": {"total": 2_600_000},
        "quality": entries,
        "training": {"steps": 3000, "seconds": seconds, "cpu_seconds": seconds / 2},
        "curve": {
            "train": [[s, 8.0 / (1 + s / 500), CONSTANT_K if sparse else None, 1e-3] for s in range(0, 3001, 100)],
            "valid": [[s, {key: 8.0 / (1 + s / 500) + 0.1}] for s in range(500, 3001, 500)],
        },
        "environment": {"device": "cpu", "threads": 1, "precision": "fp32"},
    }
    for name, value in changes.items():
        overwrite(made, name, value)
    return made


def overwrite(made, name, value):
    """Sets one field by a name such as dataset__title; returns the record."""
    *parents, last = name.split("__")
    place = made
    for parent in parents:
        place = place[parent]
    place[last] = value
    return made


def dense(value=2.3, seed=1, **changes):
    return record("dense", seed, {None: value}, **changes)


def store(*records, where="results/table1"):
    Path(where).mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(records):
        Path(where, f"{i}.json").write_text(json.dumps(one))


def row(text, title):
    """The cells of the Markdown row that starts with `title`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {title}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def refusal(argv, capsys):
    """The message of a refused command, whose exit code has to be 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == UserError.code
    last = error.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in error
    return last


def test_table_numbers(folder, capsys):
    smoe = [record("smoe", s, {8: 2.5, 16: 2.5}) for s in (1, 2)]
    drop = [record(seed=s, quality={8: 2.7 + d, 16: 2.4 + d}, seconds=t) for s, d, t in ((1, 0.0, 10), (2, 0.1, 5000), (3, 0.2, 20))]
    store(*smoe, *drop, dense(2.3))
    main(["table1"])
    text = capsys.readouterr().out
    # means 2.8 and 2.5, sample deviation of (0, .1, .2) is .1; median of 10, 20 and 5,000 s is 20
    expected = ["SMoE-Dropout (n = 3)", "2.800 ± 0.100", "2.500 ± 0.100", "2.60 M", "1.80 M / 2.60 M", "20 / 10", "16.0 M / 32.0 M"]
    assert row(text, "SMoE-Dropout") == [*expected, "+80; +50 / +0", "1.1776 / 1.1486"]
    assert row(text, "Dense") == ["Dense (n = 1)", "–", "**2.300**", "2.60 M", "– / 2.60 M", "100 / 50", "– / 32.0 M", "–", "–"]
    assert row(text, "SMoE (learned router) (")[1:3] == ["**2.500 ± 0.000**", "2.500 ± 0.000"]
    assert "k = E/2 = 8" in text and "k = E = 16" in text
    for part in ("enwik8 prefix, 4.15 MB, preset laptop", "seeds 1, 2, 3", "3,000 steps", "fp32", "threads: 1", "device: cpu"):
        assert part in text
    titles = [line.split(" (n")[0] for line in text.splitlines() if line.startswith("| ")]
    assert titles[1:] == ["| Dense", "| SMoE (learned router)", "| SMoE-Dropout"]


def test_bold_follows_the_metric_and_needs_two_values(folder, capsys):
    accuracy = {"metric__name": "accuracy", "metric__lower_is_better": False}
    store(record(quality={8: 80.0, 16: 82.0}, **accuracy), dense(81.0, **accuracy))
    main(["table1"])
    text = capsys.readouterr().out
    assert row(text, "SMoE-Dropout")[1:3] == ["80.0", "**82.0**"]
    assert row(text, "Dense")[2] == "81.0"


def test_missing_k_is_a_dash_and_a_partial_n_is_shown(folder, capsys):
    store(record(quality={16: 2.4}), record(seed=2, quality={8: 2.7, 16: 2.4}), record("smoe", quality={16: 2.5}))
    main(["table1"])
    text = capsys.readouterr().out
    assert row(text, "SMoE-Dropout")[1] == "2.700 (n = 1)"
    assert row(text, "SMoE (")[1] == "–" and row(text, "SMoE (")[4] == "– / 2.60 M"


def test_published_only_where_it_is_known(folder, capsys):
    other = {"dataset__name": "text8", "dataset__title": "text8"}
    store(record(), record(**other), record("thor", **other), record(model__architecture="bert", preset="quick"))
    main(["table1"])
    tables = capsys.readouterr().out.partition("\n- ")[0].split("**\n\n|")[1:]
    assert [("1.1776" in t, "Published" in t) for t in tables] == [(True, True), (False, False), (False, False)]
    entries = json.loads(PUBLISHED.read_text())["entries"]
    assert all(e["source"] and set(e["values"]) <= {*SHARES, "dense"} for e in entries)
    (table,) = elsewhere("table1")
    assert [row[0].text for row in table.rows].count("HyperRouter") == 1 and elsewhere("router") == []


def test_latex(folder):
    store(record("my_method"), record(settings={"alpha": 0.5}, seed=2), dense(2.3), dense(2.4, seed=2))
    main(["table1", "--latex", "out/table.tex"])
    text = Path("out/table.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    assert r"Dense (n = 2) & -- & \textbf{2.350 $\pm$ 0.071} & -- & 2.60 M" in text
    assert r"SMoE-Dropout, alpha 0.5 (n = 1) & \textbf{2.700} & 2.400" in text and "My method (n = 1)" in text
    assert "±" not in text and "–" not in text
    header, line = (next(one for one in text.splitlines() if one.startswith(start)) for start in ("Method", "Dense"))
    assert header.count("&") == line.count("&") == text[text.index("{tabular}{") :].split("}")[1].count("r")


def test_a_page_changes_only_between_the_markers_and_only_once(folder):
    store(record(), dense())
    main(["table1", "--page", "page.md"])
    once = Path("page.md").read_bytes()
    assert once.startswith(b"# Title\r\n\n<!-- table1:begin -->\n**enwik8 prefix") and b"old" not in once
    assert once.endswith(b"<!-- table1:end -->\ntail, \xc3\xa9\n")
    main(["table1", "--page", "page.md"])
    assert Path("page.md").read_bytes() == once


MARKED = b"<!-- table1:begin --> <!-- table1:end -->"


@pytest.mark.parametrize("text", [b"no markers", MARKED[:21], MARKED[22:] + MARKED[:21], MARKED * 2, b"\xff" + MARKED, None])
def test_a_page_without_markers_or_not_utf_8_is_refused(folder, capsys, text):
    store(record())
    if text is None:
        Path("page.md").unlink()
    else:
        Path("page.md").write_bytes(text)
    assert "page.md" in refusal(["table1", "--page", "page.md"], capsys)
    assert text is None or Path("page.md").read_bytes() == text


BROKEN = [
    ("schema", 3, "the field 'schema' is 3"),
    ("settings", "(a=1)", "'settings' must be object, got str"),
    ("settings", {"lr": -1.0}, "'settings.lr' must be float > 0.0"),
    ("settings", {"moe_index": None, "n_layer": "4"}, "'settings.n_layer' must be int, got str"),
    ("seed", "one", "'seed' must be int"),
    ("seed", True, "'seed' must be int, got bool"),
    ("dataset__title", "", "'dataset.title'"),
    ("dataset__bytes", {"train": 9}, "'dataset.bytes' lacks test"),
    ("training__seconds", float("nan"), "'training.seconds' is not a finite number"),
    ("training__steps", -1, "'training.steps' must be int >= 0"),
    ("training__steps", 3000.0, "'training.steps' must be int, got float"),
    ("model__num_experts", None, "'model.num_experts' must be 1 or more"),
    ("model__num_experts", 8, "'quality' must have a row for each k up to 8"),
    ("quality", [], "'quality'"),
    ("quality", [{"k": 8, "flops_per_token": 2.0}], "'quality[0]' lacks test"),
    ("sparse", 1, "'sparse' must be bool"),
    ("sparse", False, "'quality' must have one row, with k null"),
    ("curve__train", [[1, 2]], "'curve.train[0]' must be array of length 4"),
    ("curve__valid", [[1, {"8": "low"}]], "must be float, got str"),
    ("dataset", "enwik8", "'dataset' must be object"),
    ("environment", {"device": "cpu", "threads": 1}, "'environment' lacks precision"),
    ("routing", {"load_entropy": 1.5, "fluctuation": None}, "'routing.load_entropy' must be float <= 1.001"),
    ("routing", {"load_entropy": 1, "fluctuation": None, "output_similarity": 2}, "'routing.output_similarity' must be"),
    ("pretrained", None, "'pretrained' must be object, got null"),
    ("pretrained", {"sha256": "a", "transferred": True, "operations": []}, "'pretrained' lacks dataset"),
    ("lost", "metrics.jsonl", "'lost' must be array"),
]


@pytest.mark.parametrize(("name", "value", "fault"), BROKEN)
def test_broken_records_are_refused_by_name(folder, capsys, name, value, fault):
    store(dense(), overwrite(record(), name, value))
    error = refusal(["table1"], capsys)
    assert error.startswith("error: results/table1/1.json") and fault in error


NO_RECORD = {
    "not JSON": (lambda path: path.write_text("{"), "is not readable as JSON"),
    "a list": (lambda path: path.write_text("[1]"), "is not a JSON object"),
    "binary": (lambda path: path.write_bytes(b"\x00\xff"), "is not readable as JSON"),
    "nested": (lambda path: path.write_text("[" * 100_000 + "]" * 100_000), "is nested deeper"),
    "1 GB": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 30), "is larger than 64 MB"),
    "a pipe": (os.mkfifo, "is not a file"),
    "a folder": (Path.mkdir, "is not a file"),
    "a circle": (lambda path: path.symlink_to(path), "cannot be read"),
}


@pytest.mark.parametrize("kind", NO_RECORD)
def test_a_file_that_is_no_record_is_refused(folder, capsys, kind):
    make, fault = NO_RECORD[kind]
    Path("runs/a").mkdir(parents=True)
    make(Path("runs/a/result.json"))
    for argv in (["table1", "--runs", "runs"], ["table1", "--results", "runs"], ["--collect", "runs/a"]):
        error = refusal(argv, capsys)
        assert error.startswith("error: runs/a/result.json") and fault in error


NO_PLACE = {
    "a file in the way": (lambda: Path("place").write_text("kept"), "place/below"),
    "a pipe": (lambda: os.mkfifo("place"), "place"),
    "a circle": (lambda: Path("place").symlink_to("place"), "place"),
    "a name too long": (lambda: None, "a/" + "b" * 300),
    "/proc": (lambda: None, "/proc/place"),
}


@pytest.mark.parametrize("kind", NO_PLACE)
def test_a_place_that_cannot_be_written_is_refused_and_nothing_left(folder, capsys, kind):
    make, place = NO_PLACE[kind]
    store(record())
    make()
    before = sorted(folder.rglob("*"))
    for flag in ("--latex", "--page", "--figs"):
        error = refusal(["table1", flag, place], capsys)
        assert error.startswith(f"error: {place}") and len(error) < 600
        assert sorted(folder.rglob("*")) == before


def test_collect_is_refused_where_nothing_can_be_written(folder, capsys):
    run_folder("runs/a", record())
    Path("results").write_text("kept")
    assert "results/table1/smoe_dropout/" in refusal(["--collect", "runs/a"], capsys) and Path("results").read_text() == "kept"


def test_a_record_whose_digit_was_changed_is_refused(folder, capsys):
    """A record of an earlier version has no checksum; it is taken, and a note says so."""
    store(record(), dense())
    main(["table1"])
    assert "note: results/table1/0.json has no checksum" in capsys.readouterr().err
    for path in Path("results/table1").iterdir():
        documents.write(path, json.loads(path.read_text()))
    main(["table1"])
    assert "note" not in capsys.readouterr().err
    path = Path("results/table1/0.json")
    path.write_text(path.read_text().replace("2.7", "2.6", 1))
    assert "does not match its checksum" in refusal(["table1"], capsys)


def test_what_a_run_lost_is_a_footnote_of_its_row(folder, capsys):
    store(record(lost=["metrics.jsonl before step 400", "env.json"]), record(seed=2), dense())
    main(["table1"])
    out = capsys.readouterr().out
    assert "- SMoE-Dropout, seed 1: parts of its run folder were damaged and are lost: metrics.jsonl before step 400; env.json." in out


def test_incomplete_and_foreign_records_are_named_and_left_out(folder, capsys):
    store(dense(), {"schema": 2, "status": "running"}, record(table="table9"))
    main(["table1"])
    out, err = capsys.readouterr()
    assert "results/table1/1.json" in err and "running" in err
    assert "SMoE-Dropout" not in out
    store({"schema": 2, "status": "running"}, where="other")
    assert "no complete record" in refusal(["table1", "--results", "other"], capsys)
    assert "nowhere" in refusal(["table1", "--runs", "nowhere"], capsys)


def test_the_same_run_counts_once_and_contradictions_are_refused(folder, capsys):
    store(record())
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/result.json").write_text(json.dumps(record()))
    argv = ["table1", "--results", "results/table1", "--runs", "runs"]
    main(argv)
    assert "SMoE-Dropout (n = 1)" in capsys.readouterr().out
    for change, named in (
        ({"seconds": 1.0}, "seed 1"),
        ({"seed": 2, "training__steps": 5}, "training.steps"),
        ({"seed": 2, "experts": 8, "quality": {8: 2.7}}, "num_experts"),
    ):
        Path("runs/a/result.json").write_text(json.dumps(record(**change)))
        error = refusal(argv, capsys)
        assert named in error and "runs/a/result.json" in error and "results/table1/0.json" in error
    Path("runs/a/result.json").write_text(json.dumps(dense(dataset__fingerprint="g")))
    assert "dataset.fingerprint" in refusal(argv, capsys)


def run_folder(name, content):
    Path(name).mkdir(parents=True, exist_ok=True)
    Path(name, "result.json").write_text(json.dumps(content, indent=1))
    return Path(name)


def test_collect(folder, capsys):
    run = run_folder("runs/a", record(seed=3))
    target = Path("results/table1/smoe_dropout/enwik8-prefix-laptop-seed3.json")
    main(["table1", "--collect", "runs/a"])
    assert documents.read(target, dict, "") == json.loads((run / "result.json").read_text())
    main(["--collect", "runs/a"])  # the same again is no conflict
    assert "cannot be collected into 'table2'" in refusal(["table2", "--collect", "runs/a"], capsys)
    run_folder("runs/a", record(seed=3, seconds=7.0))
    assert "--force" in refusal(["--collect", "runs/a"], capsys)
    assert json.loads(target.read_text())["training"]["seconds"] == 100.0
    main(["--collect", "runs/a", "--force"])
    assert json.loads(target.read_text())["training"]["seconds"] == 7.0


def test_collect_refuses_before_it_writes(folder, capsys):
    run_folder("runs/good", record(seed=5))
    for name, content, said in (
        ("running", {"schema": 2, "status": "running"}, "running"),
        ("foreign", record(table="table9"), "table9"),
        ("twin", record(seed=5, seconds=1.0), "same name"),
    ):
        run_folder(f"runs/{name}", content)
        error = refusal(["--collect", "runs/good", f"runs/{name}"], capsys)
        assert said in error and f"runs/{name}/result.json" in error
    assert "runs/none/result.json" in refusal(["--collect", "runs/none"], capsys)
    assert not Path("results").exists()


def test_rows_with_and_without_dropout_stand_in_one_table():
    found = [(Path(f"{i}.json"), one) for i, one in enumerate([record(), record(preset_settings={"dropout": 0.1}), dense(2.0)])]
    (group,) = method_groups(found)
    assert [row.label for row in group.rows] == ["Dense", "SMoE-Dropout", "SMoE-Dropout, dropout 0.1"] and "dropout" not in group.title
    apart = method_groups([*found, (Path("3.json"), record(preset_settings={"dropout": 0.1, "clip": 9.0}))])
    assert [len(group.rows) for group in apart] == [1, 3]


def test_a_router_that_is_trained_is_told_once():
    def said(**settings) -> list[str]:
        return phrases({"output_scale": "dense", **settings})

    assert said(gate_name="learned", freeze_gate=False) == ["times E", "trained router"]
    assert said(freeze_gate=False, gate_name="hyper_router") == ["times E", "trained hyper router"]
    assert said(gate_name="learned") == ["times E", "learned router"] and said(freeze_gate=False) == ["times E", "router trained"]


def test_numbers_are_short():
    assert [short_number(n) for n in (0, 999, 999_600, 4_470_000, 19_521_804, 123_456_789, 2.5e9)] == [
        "0",
        "999",
        "1.00 M",
        "4.47 M",
        "19.5 M",
        "123 M",
        "2.50 G",
    ]


def test_user_errors_are_user_errors():
    with pytest.raises(UserError, match=r"gone\.json"):
        read_record(Path("gone.json"))


def test_routing_has_a_column_where_it_was_measured(folder):
    """Means over the seeds; empty for methods without it, and omitted if no method has it."""
    found = [{"load_entropy": entropy, "fluctuation": share} for entropy, share in ((0.9, 0.2), (0.8, 0.1))]
    store(dense(), *(record(seed=seed, routing=routing) for seed, routing in enumerate(found, 1)))
    main(["table1", "--page", "page.md"])
    text = Path("page.md").read_text()
    header, *rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|") and ":--" not in line]
    column = next(i for i, name in enumerate(header) if name.startswith("Load entropy"))
    assert [row[column].strip(" |") for row in rows] == [DASH, "0.850 / 15 %"] and "Routes changing late" in text
    store(record("other", 1, routing={"load_entropy": 0.5, "fluctuation": None}))
    main(["table1", "--page", "page.md"])
    assert "0.500 / –" in Path("page.md").read_text() and "Similarity of experts" not in Path("page.md").read_text()
    newer = {"load_entropy": 0.5, "fluctuation": None, "dead_experts": 0.125, "output_similarity": -0.04}
    store(record("newer", 1, routing=newer))
    main(["table1", "--page", "page.md"])
    header, *rows = [line.split(" | ") for line in Path("page.md").read_text().splitlines() if line.startswith("|") and ":--" not in line]
    column = header.index("Dead experts, k = E/2")
    shown = {row[0]: (row[column], row[column + 1].strip(" |")) for row in rows}
    assert header[column + 1].strip(" |") == "Similarity of experts" and [*shown.values()].count((DASH, DASH)) == len(rows) - 1
    assert next(pair for label, pair in shown.items() if "Newer" in label) == ("12.5 %", "-0.040")
