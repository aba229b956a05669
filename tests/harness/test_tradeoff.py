"""python -m benchmarks tradeoff: records of real runs, tables and fronts. Nothing here asserts a time."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tradeoff_table import FLOPS, MASS, TIME, UNIFORM, Group, groups, interpolated, load, render, table
from tests import tiny
from utils import documents
from utils.errors import UserError

RUNS = {"sparse": "elastic", "dense": "dense"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = tiny.write_corpus(folder / "text")
    for name, method in RUNS.items():
        tiny.completed(tiny.flags(data, folder / name, method=method, max_step=4, eval_interval=4))
    return folder


def measure(folder: Path) -> None:
    from benchmarks import tradeoff

    flags = tradeoff.TradeoffFlags(
        runs=(folder / "sparse",),
        dense=(folder / "dense",),
        k=(1, 2, 4),
        flops=(0.5,),
        times=(1.0,),
        p=(0.4,),
        calibration=48,
        timed=16,
        rounds=1,
    )
    flags = replace(flags, out=folder / "records")
    tradeoff.run(flags)
    for changes, sentence in (
        ({"runs": ()}, "no run is given"),
        ({"runs": (folder / "dense",)}, "is dense: give it by --dense"),
        ({"dense": (folder / "sparse",)}, "has experts: give it among the runs"),
    ):
        with pytest.raises(UserError, match=sentence):
            tradeoff.run(replace(flags, **changes))


def test_command_writes_a_record_for_each_run(runs):
    """Qualities at uniform k and of the dense model are those of the runs' own records, so the text and the memory are the same."""
    tiny.call(measure, runs)
    (record,) = load(runs / "records")
    ways = {(row["kind"], row["setting"]): row for row in record["rows"]}
    ways.pop((UNIFORM, 3), None)  # there if measured times compare the plan by time with it
    assert list(ways) == [*((UNIFORM, k) for k in (1, 2, 4)), (FLOPS, 0.5), (TIME, 1.0), (MASS, 0.4), ("dense", 0)]
    tested = {row["k"]: row for name in ("sparse", "dense") for row in tiny.read_json(runs / name / "result.json")["quality"]}
    for k, way in ((1, (UNIFORM, 1)), (2, (UNIFORM, 2)), (4, (UNIFORM, 4)), (None, ("dense", 0))):
        assert ways[way]["bpc"] == pytest.approx(tested[k]["test"], rel=1e-6), way
        assert ways[way]["flops_per_token"] == pytest.approx(tested[k]["flops_per_token"])
    planned, mass = ways[FLOPS, 0.5], ways[MASS, 0.4]
    assert planned["mean_k"] == planned["plan"]["k"] and sum(planned["plan"]["k"]) <= 4 and planned["plan"]["uniform"] == 2
    assert planned["plan"]["loss"] <= planned["plan"]["uniform_loss"]
    assert all(1 <= k <= 4 for k in mass["mean_k"]) and ways[UNIFORM, 1]["flops_per_token"] < mass["flops_per_token"]
    assert ways["dense", 0]["ratio"] == 1 and record["run"]["name"] == "sparse" and record["dense"]["name"] == "dense"
    lines = [line for line in render(runs / "records").splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(record["rows"]) and lines[-1].startswith("| dense, equal parameters | – |")


def record(seed: int, shift: float, method: str = "elastic") -> dict:
    """Uniform k = 1, 2 and 4 of one layer, a plan for the budget of k = 2, a threshold, and a better, slower dense model."""
    of_run = {"name": f"run{seed}", "table": "table1", "method": method, "settings": {}, "preset": "quick", "preset_settings": {}}
    of_run |= {
        "seed": seed,
        "dataset": {"title": "a text"},
        "metric": {"name": "bpc", "lower_is_better": True},
        "model": {"num_experts": 4},
    }

    def row(kind: str, setting: float, bpc: float, flops: float, ratio: float, **more) -> dict:
        cost = {"flops_per_token": flops, "seconds": ratio, "ratio": ratio, "positions": 9, "mean_k": [flops]}
        return {"kind": kind, "setting": setting, "bpc": bpc + shift, **cost, **more}

    plan = {"k": [2], "unit": "flops", "budget": 0.5, "uniform": 2, "loss": 1.0, "uniform_loss": 1.1}
    rows = [row(UNIFORM, 1, 3.0, 1, 0.5), row(UNIFORM, 2, 2.0, 2, 0.7), row(UNIFORM, 4, 1.8, 4, 0.6)]
    rows += [row(FLOPS, 0.5, 1.9 - 2 * shift, 2, 0.7, plan=plan), row(MASS, 0.6, 2.1, 3, 0.9), row("dense", 0, 1.5, 4, 1)]
    where = {"commit": "c" * 40, "device_name": "a CPU", "cores": 2, "threads": 1, "torch": "2"}
    sizes = {"calibration": 48, "rounds": 1, "clock": "thread_time"}
    return {"run": of_run, "dense": {"name": "dense"}, "sizes": sizes, "rows": rows, "environment": where}


def test_differences_are_paired_by_seed_and_thresholds_are_compared_at_equal_flops():
    group = Group([record(2, 0.1), record(1, 0.0)])
    assert group.seeds == [1, 2] and group.mean((UNIFORM, 1), "bpc") == pytest.approx(3.05)
    assert group.against_uniform((FLOPS, 0.5)) == (pytest.approx([-0.1, -0.3]), pytest.approx([1, 1]))
    assert group.against_uniform((MASS, 0.6)) == (pytest.approx([0.2, 0.2]), [])  # less (2.0 + 1.8) / 2
    assert interpolated([(1, 3.0), (2, 2.0)], 2.5) == []
    lines = table(group).splitlines()
    assert (
        "2 seeds" in lines[0]
        and "| planned by FLOPs, 0.5 of the experts' FLOPs | 2; 2 | 0.000 M | 0.70 | 1.850 | -0.200 ± 0.141 |" in lines[7]
    )


def test_front_has_no_way_that_another_beats_in_cost_and_quality():
    group = Group([record(1, 0.0)])
    assert group.front("flops_per_token") == [(UNIFORM, 1), (FLOPS, 0.5), ("dense", 0)]
    assert group.front("ratio") == [(UNIFORM, 1), (UNIFORM, 4), ("dense", 0)]


def test_models_have_tables_of_their_own_and_damaged_records_are_refused(tmp_path):
    many = [record(1, 0.0), record(1, 0.0, "smoe_dropout"), record(2, 0.1)]
    assert [(group.run["method"], group.seeds) for group in groups(many)] == [("elastic", [1, 2]), ("smoe_dropout", [1])]
    with pytest.raises(UserError, match="holds no record"):
        load(tmp_path)
    documents.write(tmp_path / "a.json", many[0] | {"rows": []})
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        load(tmp_path)
