"""Ablations: the rows of rows.json, which run belongs to which row, the table and the figure."""

import itertools
import json

import pytest

from tests.conftest import ROOT
from tests.harness.test_report import record, refusal, store
from tests.tiny import parse
from utils.errors import UserError
from utils.flags.derive import usual_flags
from utils.reporting import ablations
from utils.reporting.__main__ import main, render
from utils.reporting.ablations import ablation_tables, all_ablations, build_table, groups_of
from utils.reporting.tables import to_markdown
from utils.training.identity import departures

ROWS = [
    (ablation.name, row.name, preset)
    for ablation in all_ablations().values()
    for row in ablation.rows
    for preset in ([ablation.preset] if ablation.preset else ["paper", "laptop"])
]


def run_of(flags, **changes) -> dict:
    """The record of a run with these decided flags."""
    preset_settings, settings = departures(flags, usual_flags(flags))
    identity = {"method": flags.method, "settings": settings, "preset": flags.preset, "preset_settings": preset_settings}
    experts = flags.moe_num_expert
    quality = {experts // 2: 4.0, experts: 2.0} if flags.moe else {None: 2.5}
    made = record(quality=quality, experts=experts)
    return made | {"training": made["training"] | {"steps": flags.max_step}} | identity | changes


def runs_of(name: str, *more: str) -> list:
    """A run of each row as its script starts it, with further flags."""
    rows, preset = all_ablations()[name].rows, all_ablations()[name].preset or "laptop"
    return [(row.name, run_of(parse([*row.words, "--preset", preset, *more]))) for row in rows]


@pytest.mark.parametrize(("name", "row", "preset"), ROWS)
def test_a_run_of_a_row_is_recognised(name, row, preset):
    """A row is found by the recorded identity of its run, also with a flag that all rows share, at its preset or any of four layers."""
    ablation = all_ablations()[name]
    (one,) = (one for one in ablation.rows if one.name == row)
    for more, rest in (([], {}), (["--clip", "9"], {"clip": 9.0})):
        run = run_of(parse([*one.words, "--preset", preset, *more]))
        index, _, further = ablation.find(run)
        assert (ablation.rows[index].name, further) == (row, rest)
        assert not ablation.preset or ablation.find(run | {"preset": "laptop"}) is None


def test_rows_that_share_a_run_are_the_same_run():
    """No two rows train into one folder unless all their flags agree, at the presets of four layers."""
    folders = {}
    for ablation in all_ablations().values():
        for row in ablation.rows:
            flags = parse(["--preset", "paper", *row.words])
            assert folders.setdefault(flags.work_dir, flags) == flags
            assert ablation.preset or (flags.preset, flags.max_step, flags.d_ff) == ("paper", 400_000, 8192)


def test_a_row_is_listed_as_words_of_a_command_line(capsys):
    ablations.main(["router"])
    assert capsys.readouterr().out.split() == [row.name for row in all_ablations()["router"].rows]
    ablations.main(["router", "balanced"])
    words = capsys.readouterr().out.split("\n")
    assert words == ["--method", "smoe_dropout", "--gate_name", "learned", "--no-freeze_gate", "--run_name", "balanced", ""]
    for argv, said in ((["routers"], "unknown ablation 'routers'; nearest: router"), (["router", "hush"], "unknown row of router 'hush'")):
        with pytest.raises(UserError, match=said):
            ablations.main(argv)


def test_layers_without_experts_are_as_wide_as_requested():
    """Official: as wide as one expert; in the ablation of layers: with equal parameters."""
    from utils.models.build import build_model
    from utils.models.flops import parameter_counts

    some = ["--preset", "laptop", "--method", "smoe_dropout", "--moe_index", "0,1"]
    official, equal, dense = (
        build_model(parse(argv)) for argv in (some, [*some, "--dense_width", "all"], [*some[:2], "--method", "dense"])
    )
    assert official.layers[3].feed_forward.core[0].out_features == 64
    assert equal.layers[3].feed_forward.core[0].out_features == dense.layers[3].feed_forward.core[0].out_features == 1024
    experts = [parameter_counts(build_model(parse(argv)))["total"] for argv in (some[:4], [*some, "--dense_width", "all"])]
    assert experts[0] == pytest.approx(experts[1], rel=0.01)


def test_the_table_of_a_schedule_has_the_order_of_its_rows_and_published_numbers():
    exponential = record(settings={"dynamic_moe_mode": "exp_increase"}, quality={8: 6.0, 16: 3.0})
    found = [("b", exponential), ("a", record(quality={8: 4.0, 16: 2.0})), ("c", record("thor", quality={8: 1.0, 16: 1.0}))]
    (group,) = groups_of(all_ablations()["schedule"], found)
    lines = to_markdown(build_table(all_ablations()["schedule"], group)).splitlines()
    assert [line.split(" | ")[:4] for line in lines[4:6]] == [
        ["| linear, E/2 to E (n = 1)", "**4.000**", "**2.000**", "2.000 (k = 16)"],
        ["| exponential (n = 1)", "6.000", "3.000", "3.000 (k = 16)"],
    ]
    assert lines[4].endswith("| 1.1776 / 1.1486 |") and lines[5].endswith("| 1.2167 / 1.1877 |")


def test_runs_of_other_presets_are_not_compared_and_depth_is_no_other_preset():
    deep = [("a", record()), ("b", record(preset_settings={"n_layer": 8}))]
    assert [len(group.rows) for group in groups_of(all_ablations()["depth"], deep)] == [2]
    assert groups_of(all_ablations()["schedule"], deep) == []
    assert groups_of(all_ablations()["router"], [("a", record()), ("b", record(settings={"gate_name": "hash"}, preset="quick"))]) == []


def test_runs_with_further_flags_are_compared_among_themselves():
    found = runs_of("depth")[:2] + runs_of("depth", "--max_step", "9")[:2]
    rows = ["4 layers, SMoE-Dropout", "8 layers, SMoE-Dropout"]
    groups = {
        group.title.partition("preset ")[2]: [row.label for row in group.rows] for group in groups_of(all_ablations()["depth"], found)
    }
    assert groups == {"laptop": rows, "laptop, 9 steps": rows}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"settings": {"moe_index": "0,1"}}, "layers"),
        ({"preset_settings": {"n_layer": 6}}, "depth"),
        ({"method": "smoe"}, "router"),
        ({"pretrained": {}}, "schedule"),
    ],
)
def test_a_run_of_no_row_is_left_out(changes, name):
    assert all_ablations()[name].find(record() | changes) is None


def test_runs_of_different_texts_are_refused():
    found = [("a", record()), ("b", record(settings={"gate_name": "hash"}, dataset__fingerprint="other"))]
    with pytest.raises(UserError, match="fingerprint"):
        groups_of(all_ablations()["router"], found)


def test_one_row_alone_is_no_ablation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store(record(), where="runs")
    assert "no two finished rows" in refusal(["ablation", "--results", "runs"], capsys)


@pytest.mark.parametrize("name", ["experts", "depth"])
def test_figures_along_a_number_have_a_panel_of_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(*(one for _, one in runs_of(name)), where="runs")
    main(["ablation", "--only", name, "--results", "runs", "--figs", "Figs"])
    (figure,) = (tmp_path / "Figs" / "ablation").iterdir()
    assert figure.name == f"enwik8-prefix-laptop-{name}.png" and figure.stat().st_size > 10_000
    assert f"(Figs/ablation/{figure.name})" in render("ablation", ablation_tables(runs_of(name), [name]), "Figs")


def study_runs(name: str) -> list:
    """Two seeds of every row of a study: quality by its place, worse at E/2, and in the second seed for the last label."""
    study, found = all_ablations()[name], []
    for seed, (i, (row, one)) in itertools.product((1, 2), enumerate(runs_of(name))):
        at, last = study.places.index(study.rows[i].at), study.rows[i].label == study.rows[-1].label
        quality = [{**entry, "test": 4 - at / 2 + (0.1 * seed if last else 0) + 0.25 * (entry["k"] == 8)} for entry in one["quality"]]
        found.append((f"{row}-{seed}", {**one, "seed": seed, "quality": quality}))
    return found


def without_claims(tables: list) -> list:
    """Tables other than those of tests/harness/test_claims.py."""
    return [table for table in tables if not table.label.startswith("claims:")]


def test_a_study_has_a_table_for_each_place_and_differences_are_those_of_a_seed():
    tables = without_claims(ablation_tables(study_runs("length"), page="replica"))
    title = "Length of training, tokens per parameter"
    assert [table.caption.partition(".")[0] for table in tables] == [f"{title}: {at}" for at in (5, 20, 95, 231)]
    text = to_markdown(tables[2]).splitlines()
    assert text[2].startswith("| Method | Test bpc, k = E/2 = 8 | Test bpc, k = E = 16 | loss from E to E/2 | gap to dense, k = E/2 |")
    rows = {line.partition(" (n = 2)")[0]: line.split(" | ")[1:] for line in text[4:12]}
    assert rows["| dense"] == ["–", "**3.000 ± 0.000**", "–", "–", "–", "– |"]
    assert rows["| SMoE-Dropout"] == [
        "**3.250 ± 0.000**",
        "**3.000 ± 0.000**",
        "**0.250 ± 0.000**",
        "**0.250 ± 0.000**",
        "**0.000 ± 0.000**",
        "100 % |",
    ]
    learned = ["3.400 ± 0.071", "3.150 ± 0.071", "**0.250 ± 0.000**", "0.400 ± 0.071", "0.150 ± 0.071", "63 % |"]
    assert rows["| learned elastic, times E"] == learned
    missing = [(path, one) for path, one in study_runs("length") if not (path.startswith("dense_95") and one["seed"] == 2)]
    partly = to_markdown(without_claims(ablation_tables(missing, page="replica"))[2])
    cells = "3.400 ± 0.071 | 3.150 ± 0.071 | **0.250 ± 0.000** | 0.350 (n = 1) | 0.100 (n = 1)"
    assert f"| learned elastic, times E (n = 2) | {cells} |" in partly


def test_a_study_needs_a_curve_or_its_baseline():
    """Dense models at several rates, and those with experts at one, are a part of another study."""
    one_rate = [(path, one) for path, one in study_runs("dropout") if not one["sparse"] or not one["preset_settings"]]
    assert len(one_rate) > 10 and ablation_tables(one_rate, ["dropout"]) == []
    one_length = [(path, one) for path, one in study_runs("length") if one["preset_settings"].get("max_step") == 880]
    assert len(without_claims(ablation_tables(one_length, ["length"]))) == 1
    assert ablation_tables([(path, one) for path, one in one_length if one["method"] != "dense"], ["length"]) == []


def test_specialists_are_compared_at_the_k_of_their_training():
    """The baseline, a model for every k, has 2 + 1/k; a specialist is 0.1 better at its own k, and much worse elsewhere."""
    found = []
    for seed, (row, one) in itertools.product((1, 2), zip(all_ablations()["specialists"].rows, runs_of("specialists"), strict=True)):
        own, test = row.at, 2 + 0.01 * seed
        quality = [
            {**one[1]["quality"][0], "k": k, "test": test + 1 / k + (0 if own is None else -0.1 if k == own else 9)}
            for k in (1, 2, 4, 8, 16)
        ]
        found.append((f"{row.name}-{seed}", {**one[1], "seed": seed, "quality": quality}))
    (table,) = ablation_tables(found, ["specialists"])
    cells = [[cell.text for cell in line] for line in table.rows]
    assert [line[0] for line in cells] == [f"trained at k = {k} alone (n = 2)" for k in (1, 2, 4, 8, 16)]
    assert [line[1:] for line in cells[:2]] == [
        ["2.915 ± 0.007", "3.015 ± 0.007", "0.100 ± 0.000"],
        ["2.415 ± 0.007", "2.515 ± 0.007", "0.100 ± 0.000"],
    ]
    without = [(path, one) for path, one in found if "elastic" not in path]
    assert ablation_tables(without, ["specialists"]) == []


@pytest.mark.parametrize("name", [name for name, one in all_ablations().items() if one.preset])
def test_the_figure_of_a_study_is_drawn(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(*(one for _, one in study_runs(name)), where="runs")
    main(["replica", "--only", name, "--results", "runs", "--figs", "Figs"])
    assert (tmp_path / "Figs" / "replica" / f"enwik8-prefix-{name}.png").stat().st_size > 20_000


def test_lengths_are_the_tokens_that_a_parameter_sees():
    """At preset replica, within two per cent."""
    from utils.models.build import build_model
    from utils.models.flops import parameter_counts

    for row in all_ablations()["length"].rows:
        flags = parse(row.words)
        tokens = flags.max_step * flags.batch_size * flags.tgt_len
        assert tokens / parameter_counts(build_model(flags))["total"] == pytest.approx(row.at, rel=0.02), row.name


def test_a_run_is_collected_under_its_row(tmp_path, monkeypatch, capsys):
    """A run that belongs to rows of several ablations is collected under the first."""
    monkeypatch.chdir(tmp_path)
    for name, one in runs_of("schedule")[-3:-1]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(one))
    main(["ablation", "--collect", "constant_all", "decreasing"])
    assert {path.parent.name for path in (tmp_path / "results").rglob("*.json")} == {"schedule-constant_all", "schedule-decreasing"}
    (tmp_path / "decreasing" / "result.json").write_text(json.dumps(dict(runs_of("place"))["smoe_dropout_all"]))
    main(["replica", "--collect", "decreasing"])
    assert [path.parent.name for path in (tmp_path / "results" / "replica").rglob("*.json")] == ["length-smoe_dropout_95"]
    (tmp_path / "decreasing" / "result.json").write_text(json.dumps(record("thor")))
    assert "is no row of script/ablation/rows.json" in refusal(["ablation", "--collect", "decreasing"], capsys)


def test_every_row_of_the_file_has_a_label_of_its_own():
    for name, one in json.loads((ROOT / "script" / "ablation" / "rows.json").read_text()).items():
        labels = [(row["label"], row.get("at")) for row in one["rows"]]
        assert len({*labels}) == len(labels) > 1, name


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "is not readable as JSON"),
        (lambda text: "[]", "is not a JSON object"),
        (lambda text: text.replace('"rows"', '"rowz"', 1), "the field '[...]' lacks rows"),
        (lambda text: text.replace('"n_layer": 4', '"n_layes": 4', 1), "or the unknown flag n_layes"),
        (lambda text: text.replace('"n_layer": 4', '"n_layer": "4"', 1), "the field 'n_layer' must be int"),
        (lambda text: text.replace('"method"', '"methof"', 1), "has no method"),
    ],
)
def test_a_damaged_list_of_rows_is_named(damage, said, tmp_path, monkeypatch):
    damaged = tmp_path / "rows.json"
    damaged.write_text(damage(ablations.ROWS.read_text()))
    monkeypatch.setattr(ablations, "ROWS", damaged)
    ablations.all_ablations.cache_clear()
    try:
        with pytest.raises(UserError) as error:
            ablations.main(["depth"])
    finally:
        ablations.all_ablations.cache_clear()
    assert said in str(error.value) and str(damaged) in str(error.value)
