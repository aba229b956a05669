"""Figures of records with known numbers: which are drawn, what is in them, and that tables need no matplotlib."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.harness.test_report import dense, record, store
from utils.reporting.__main__ import main
from utils.reporting.groups import Row, method_groups


def png_size(path):
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    return struct.unpack(">II", data[16:24])


def test_figures_of_a_full_table(folder, capsys):
    store(*(record(seed=s, quality={1: 7.5, 8: 2.7 + s / 50, 16: 2.4}) for s in (1, 2)), record("smoe"), dense(), dense(2.4, seed=2))
    main(["table1", "--figs", "Figs"])
    names = {path.name for path in Path("Figs/table1").iterdir()}
    assert names == {"enwik8-prefix-laptop-slimmable.png", "enwik8-prefix-laptop-curves.png"}
    assert all(min(png_size(f"Figs/table1/{name}")) > 400 for name in names)
    err = capsys.readouterr().err
    assert all(f"drawn Figs/table1/{name}" in err for name in names)


@pytest.mark.parametrize(
    "records",
    [
        [dense()],
        [record()],
        [record(quality={16: 2.4}), record(seed=2, quality={8: 2.6, 16: 2.4})],
        [record(experts=1, quality={1: 2.4})],
        [record(method=f"m{i}") for i in range(9)] + [dense(), record("wide", 1, {None: 2.2})],
    ],
    ids=["dense only", "one seed", "missing k", "one expert", "many methods"],
)
def test_figures_of_few_or_many_records(folder, records):
    store(*records)
    main(["table1", "--figs", "Figs"])
    assert png_size("Figs/table1/enwik8-prefix-laptop-slimmable.png")[0] > 400
    assert png_size("Figs/table1/enwik8-prefix-laptop-curves.png")[0] > 400


def test_no_curve_no_figure(folder):
    store(record(curve__train=[], curve__valid=[]))
    main(["table1", "--figs", "Figs"])
    assert not Path("Figs/table1/enwik8-prefix-laptop-curves.png").exists()
    assert Path("Figs/table1/enwik8-prefix-laptop-slimmable.png").exists()


def test_points_drawn():
    from utils.reporting import figures

    group = method_groups([(Path(f"{s}.json"), record(seed=s, quality={8: 2.7 + d, 16: 2.4})) for s, d in ((1, 0.0), (2, 0.2))])[0]
    method = group.rows[0]
    assert [(k, x) for k, x, _, _ in figures.quality_points(method)] == [(8, 1_800_000), (16, 2_600_000)]
    assert figures.quality_points(method)[0][2:] == pytest.approx((2.8, 0.2 / 2**0.5))
    method.records[1]["curve"]["valid"].pop()  # a step that one seed lacks is no mean over seeds
    assert [step for step, _, _ in figures.curve_points(method, "valid")] == [500, 1000, 1500, 2000, 2500]


def test_colours_stay_with_their_method():
    from utils.reporting import figures

    rows = [Row(name, [record(name)]) for name in ("a", "smoe", "smoe_dropout")]
    rows += [Row(f"times {n}", [record(settings={"alpha": n})]) for n in range(8)]
    first, second = figures.styles(rows), figures.styles(rows[1:3])
    assert first["smoe"] == second["smoe"] and first["smoe_dropout"] == second["smoe_dropout"]
    assert len({style["color"] for style in first.values()}) == len(rows)


def test_a_crowded_figure_names_the_baselines_and_the_best(monkeypatch):
    from utils.reporting import figures

    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    worst = {8: 9.0, 16: 9.0}
    rows = [*(record("elastic", quality={8: 3 - n / 10, 16: 2 + n / 10}, settings={"alpha": n}) for n in range(10)), dense(8.0)]
    rows += [record(quality=worst), record("smoe", quality=worst), record("elastic", quality={8: 90.0, 16: 90.0}, settings={"alpha": 10})]
    (group,) = method_groups([(Path(f"{i}.json"), one) for i, one in enumerate(rows)])
    # after the baselines the best at k = E and at E/2 in turn
    best = {row.label for row in group.rows if row.first["settings"].get("alpha") in (0, 1, 2, 8, 9)}
    assert figures.in_front(group) == {"Dense", "SMoE-Dropout", "SMoE (learned router)"} | best
    for draw in (figures.draw_quality, figures.draw_curves):
        draw(group, Path("unused.png"))
        (legend,) = drawn[-1].legends
        assert {text.get_text() for text in legend.texts} == figures.in_front(group) | {"6 others"}
    looks = figures.method_looks(group)
    assert len({looks[label]["color"] for label in figures.in_front(group)}) == 8
    figures.draw_quality(group, Path("unused.png"))
    (axes,) = drawn[-1].axes
    assert axes.get_ylim() == pytest.approx((2.0 - 0.7, 9.0 + 0.7))  # of what is named, with a tenth around it


def test_tables_need_no_matplotlib(folder):
    store(record())
    code = "import sys; sys.modules['matplotlib'] = None; from utils.reporting.__main__ import main; main(['table1'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "SMoE-Dropout" in done.stdout, done.stderr


def test_methods_of_the_frozen_router_get_figures_of_their_own(folder):
    """If there are several of them beside others."""
    fixed = [record(name, model__router="random") for name in ("a", "b")]
    store(dense(), *fixed)
    main(["table1", "--figs", "Figs"])
    assert not list(Path("Figs/table1").glob("*frozen*"))
    store(record("c", model__router="learned"))
    main(["table1", "--figs", "Figs"])
    assert len(list(Path("Figs/table1").glob("*frozen*.png"))) == 2
