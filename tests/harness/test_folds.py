"""A task of five folds: runs of every fold and seed are replicates of one another in tables and figures."""

import json
import statistics
from pathlib import Path

import pytest

from tests.harness.test_report import record, refusal, row, store
from tests.harness.test_report_figures import png_size
from utils.reporting import figures
from utils.reporting.__main__ import main
from utils.reporting.groups import method_groups

FOLDS, SEEDS = range(5), (1, 2)


def of_fold(fold: int, seed: int = 1, **changes) -> dict:
    """A record of SMoE-Dropout on a fold: quality grows by 10 % with each fold and 2 % with each seed. Model sizes that depend on what
    occurs in training has another size in every fold.
    """
    solved = 40.0 + 10 * fold + seed * 2
    data = {"name": "mawps", "title": "MAWPS", "fingerprint": f"fold {fold}", "note": f"{fold + 1} of 384 dev rows have no answer"}
    metric = {"name": "solved", "lower_is_better": False, "split": "dev", "training": "loss"}
    start = {"dataset": {"name": "enwik8"}, "preset": "laptop", "preset_settings": {}, "method": "smoe_dropout", "settings": {}}
    start |= {"steps": 3000, "operations": [], "sha256": "abcd" * 16, "transferred": True}
    own = {"fold": fold, "dataset": data, "metric": metric, "pretrained": start, "parameters__total": 2_600_000 + fold}
    made = record(seed=seed, quality={8: solved - 5, 16: solved}, table="table2", **own, **changes)
    for entry in made["quality"]:
        entry["dev"] = entry.pop("test")
    return made


ALL = [of_fold(fold, seed) for fold in FOLDS for seed in SEEDS]
SOLVED = [record["quality"][-1]["dev"] for record in ALL]


def dense(fold: int, **changes) -> dict:
    made = of_fold(fold, method="dense", sparse=False, model__num_experts=None, **changes)
    return made | {"quality": [made["quality"][-1] | {"k": None}]}


def test_folds_and_seeds_are_averaged_as_replicates(folder, capsys):
    store(*ALL, *map(dense, FOLDS), where="results/table2")
    main(["table2"])
    text = capsys.readouterr().out
    mean, spread = statistics.mean(SOLVED), statistics.stdev(SOLVED)
    cells = [f"{mean - 5:.1f} ± {spread:.1f}", f"**{mean:.1f} ± {spread:.1f}**"]
    assert row(text, "SMoE-Dropout (")[:3] == ["SMoE-Dropout (n = 10)", *cells]
    assert row(text, "Dense (")[0] == "Dense (n = 5)"
    assert "mean ± sample standard deviation over n runs (seeds 1, 2, folds 0, 1, 2, 3, 4 of 5)" in text
    assert all(text.count(f"Fold {fold}: {fold + 1} of 384 dev rows have no answer.") == 1 for fold in FOLDS)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ((1,), "one seed, spread unknown (seed 1, fold 3 of 5)"),
        ((1, 2), "mean ± sample standard deviation over n seeds (seeds 1, 2, fold 3 of 5)"),
    ],
)
def test_caption_names_the_fold(seeds, said, folder, capsys):
    store(*(of_fold(3, seed) for seed in seeds), where="results/table2")
    main(["table2"])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("other", [of_fold(3, seed=3), dense(3)], ids=["another seed", "another method"])
def test_a_fold_of_other_rows_is_refused(other, folder, capsys):
    """All folds have different rows; those of one fold are the same for every seed and method."""
    store(*ALL, other, where="results/table2")
    main(["table2"])
    other = other | {"dataset": other["dataset"] | {"fingerprint": "other rows"}}
    store(*ALL, other, where="results/table2")
    error = refusal(["table2"], capsys)
    assert all(part in error for part in ("'dataset.fingerprint'", "'other rows'", "'fold 3'", "results/table2/10.json"))


def test_seeds_of_one_fold_have_models_of_one_size(folder, capsys):
    other = of_fold(3, seed=3)
    other["parameters"]["total"] += 1
    store(*ALL, other, where="results/table2")
    assert "'parameters.total'" in refusal(["table2"], capsys)


def test_every_fold_and_seed_is_collected_under_a_name_of_its_own(folder):
    for index, made in enumerate(ALL):
        Path(f"runs/{index}").mkdir(parents=True)
        Path(f"runs/{index}/result.json").write_text(json.dumps(made))
    main(["table2", "--collect", *map(str, Path("runs").iterdir())])
    names = {path.name for path in Path("results/table2/smoe_dropout").iterdir()}
    assert names == {f"mawps-laptop-abcd-fold{fold}-seed{seed}.json" for fold in FOLDS for seed in SEEDS}


def test_the_figure_by_k_draws_the_mean_of_all_folds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    (group,) = method_groups([(Path(f"{i}.json"), made) for i, made in enumerate([*ALL, *map(dense, FOLDS)])])
    figures.draw_quality(group, tmp_path / "by_k.png")
    axes = drawn[0].axes[0]
    (line, _, (bars,)) = axes.containers[0]
    mean, spread = statistics.mean(SOLVED), statistics.stdev(SOLVED)
    assert [tuple(point) for point in line.get_xydata()] == [(8, pytest.approx(mean - 5)), (16, pytest.approx(mean))]
    assert [end - begin for (_, begin), (_, end) in bars.get_segments()] == pytest.approx([2 * spread] * 2)
    assert "mean ± standard deviation, n = 5–10 runs" in " ".join(drawn[0].get_suptitle().split())
    flat = next(line for line in axes.lines if line.get_label() == "Dense")
    assert set(flat.get_ydata()) == {statistics.mean(SOLVED[::2])}


def test_a_report_of_folds_has_its_figures(folder):
    store(*ALL, where="results/table2")
    main(["table2", "--figs", "Figs"])
    found = {path.name: png_size(path) for path in Path("Figs/table2").iterdir()}
    assert found.keys() == {"mawps-laptop-by-k.png", "mawps-laptop-curves.png"}
