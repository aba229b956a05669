"""Ablations: which run belongs to which row, the table and the figure, the scripts of the rows."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.scripts.test_scripts import flags_of
from tests.tiny import parse
from utils.errors import UserError
from utils.flags.derive import usual_flags
from utils.reporting import ablations
from utils.reporting.ablations import ABLATIONS, build_table, groups_of, main, render, row_of
from utils.reporting.records import PUBLISHED, find_records, load_records
from utils.reporting.tables import to_markdown
from utils.training.identity import departures
from utils.training.record import in_brackets

BY_NAME = {ablation.name: ablation for ablation in ABLATIONS}
SCRIPTS = [path for path in (ROOT / "script" / "ablation").glob("*/*.sh")] + [
    path for path in (ROOT / "script" / "figure5").glob("*.sh") if path.name != "run_all.sh"
]


def told(flags) -> dict:
    """What the record of such a run would say of method, preset and depth."""
    of_preset, of_method = (in_brackets(found) for found in departures(flags, usual_flags(flags)))
    return {"method": flags.method + of_method, "preset": flags.preset + of_preset, "model": {"n_layer": flags.n_layer}}


def test_every_row_has_a_script_and_every_script_a_row():
    """By the flags in it, whatever it is called."""
    found = {}
    for path in SCRIPTS:
        name = "depth" if path.parent.name == "figure5" else path.parent.name
        row = row_of(told(flags_of(path)), BY_NAME[name])
        assert row is not None, path
        assert found.setdefault((name, row.label), path) == path
    assert {*found} == {(one.name, row.label) for one in ABLATIONS for row in one.rows}


def test_layers_without_experts_are_as_wide_as_asked():
    """Official: as one expert; in the ablation of layers: of equal parameters."""
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


def records(rows: dict[str, tuple[str, str, float]]) -> list:
    """A record for each: method, preset, which says the depth, and the quality at k = E, which is doubled at E/2."""
    path = next((ROOT / "results" / "table1").glob("enwik8-prefix-laptop-smoe_dropout-seed1.json"))
    one, found = json.loads(path.read_text()), []
    for name, (method, preset, quality) in rows.items():
        by_k = [{**entry, "test": quality * 16 / entry["k"]} for entry in one["quality"]]
        depth = re.search(r"n_layer=(\d+)", preset)
        said = {"method": method, "title": method, "preset": preset, "model": {**one["model"], "n_layer": int(depth[1]) if depth else 4}}
        found.append((path.with_name(name), {**one, **said, "quality": by_k}))
    return found


def test_table_of_a_schedule_stands_in_its_order_beside_published_numbers():
    exponential = "smoe_dropout (dynamic_moe_mode=exp_increase)"
    found = records({"b": (exponential, "laptop", 3.0), "a": ("smoe_dropout", "laptop", 2.0), "c": ("thor", "laptop", 1.0)})
    (group,) = groups_of(BY_NAME["schedule"], found)
    lines = to_markdown(build_table(BY_NAME["schedule"], group, json.loads(PUBLISHED.read_text())["entries"])).splitlines()
    assert [line.split(" | ")[:4] for line in lines[4:6]] == [
        ["| linear, E/2 to E (n = 1)", "**4.000**", "**2.000**", "2.000 (k = 16)"],
        ["| exponential (n = 1)", "6.000", "3.000", "3.000 (k = 16)"],
    ]
    assert lines[4].endswith("| 1.1776 / 1.1486 |") and lines[5].endswith("| 1.2167 / 1.1877 |")


def test_runs_of_other_presets_are_not_compared_and_depth_is_no_other_preset():
    deep = records({"a": ("smoe_dropout", "laptop", 2.0), "b": ("smoe_dropout", "laptop (n_layer=8)", 1.0)})
    assert [len(group.methods) for group in groups_of(BY_NAME["depth"], deep)] == [2]
    assert groups_of(BY_NAME["schedule"], deep) == []
    other = records({"a": ("smoe_dropout", "laptop", 2.0), "b": ("smoe_dropout (gate_name=hash)", "quick", 1.0)})
    assert groups_of(BY_NAME["router"], other) == []


def test_runs_with_further_flags_are_compared_among_themselves():
    said = {"a": "laptop (max_step=9)", "b": "laptop (n_layer=8, max_step=9)", "c": "laptop", "d": "laptop (n_layer=8)"}
    found = records({name: ("smoe_dropout", preset, 2.0) for name, preset in said.items()})
    groups = {group.preset: [method.title for method in group.methods] for group in groups_of(BY_NAME["depth"], found)}
    rows = ["4 layers, SMoE-Dropout", "8 layers, SMoE-Dropout"]
    assert groups == {"laptop": rows, "laptop (max_step=9)": rows}


@pytest.mark.parametrize(
    ("method", "preset", "name"),
    [("smoe_dropout (moe_index=0,1)", "laptop", "layers"), ("smoe_dropout", "laptop (n_layer=6)", "depth"), ("smoe", "laptop", "router")],
)
def test_a_run_of_no_row_is_left_out(method, preset, name):
    ((_, run),) = records({"a": (method, preset, 2.0)})
    assert row_of(run, BY_NAME[name]) is None


def test_runs_of_different_texts_are_refused():
    found = records({"a": ("smoe_dropout", "laptop", 2.0), "b": ("smoe_dropout (gate_name=hash)", "laptop", 1.0)})
    found[1][1]["dataset"] = {**found[1][1]["dataset"], "fingerprint": "other"}
    with pytest.raises(UserError, match="fingerprint"):
        groups_of(BY_NAME["router"], found)


def test_one_row_alone_is_no_ablation(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no two finished rows"):
        main(["--runs", str(tmp_path / "runs")])


def _deep(layers: int) -> str:
    return "laptop" if layers == 4 else f"laptop (n_layer={layers})"


@pytest.mark.parametrize("name", ["experts", "depth"])
def test_figures_along_a_number_have_a_panel_of_it(name, tmp_path):
    ablation = BY_NAME[name]
    rows = [row for row in ablation.rows if row.method == "smoe_dropout"]
    said = {row.label: (f"{row.method} {row.departs}".strip(), _deep(row.number if ablation.size else 4), 2.0) for row in rows}
    text = render(records(said), [], only=[name], figs=tmp_path)
    (figure,) = tmp_path.glob("*.png")
    assert figure.stat().st_size > 10_000 and f"(Figs/{figure.name})" in text


def test_text_of_the_readme_is_rendered_from_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = load_records(find_records([path for path in ablations.RESULTS if path.exists()], []), "table1")
    text = render(found, json.loads(PUBLISHED.read_text())["entries"])
    assert (ROOT / "README.md").read_text().split("<!-- ablation:begin -->\n")[1].split("\n<!-- ablation:end -->")[0] == text


def test_tables_do_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; from utils.reporting import ablations; ablations.main([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "linear, E/2 to E" in done.stdout, done.stderr
