"""The table and figure of surgery, from records with known numbers."""

import copy
import json
from pathlib import Path

import pytest

from tests.harness.test_report import overwrite, record, refusal
from utils.errors import UserError
from utils.reporting import figures
from utils.reporting.__main__ import main
from utils.reporting.surgery_table import before, build_table, curves, from_scratch, surgery_groups

BEFORE, WHOLE = 2.0, "a" * 64


TRAINED = {"dataset": {"name": "words", "title": "Words", "fingerprint": "f"}, "preset": "laptop", "preset_settings": {}}
TRAINED |= {"method": "smoe", "settings": {}, "steps": 10}
READ = {"data": "Words", "fingerprint": "f", "task": None, "k": 8, "tokens": 65_536}
MERGE = {"method": "merge", "from": 16, "keep": 8, "options": {}, "read": READ}
DROP = {"method": "drop", "from": 16, "keep": 4, "options": {}, "read": READ}
UNCURL = {"method": "uncurl", "from": 16, "keep": 8, "options": {}, "read": READ | {"data": "SST-2", "task": "sst2"}}
COMPRESS = {"method": "compress", "options": {"rank": 4, "kept": 0.1}}


def weights(sha256: str, transferred: bool = True, **more) -> dict:
    """The entry of the weights that a run started from."""
    return {**TRAINED, "operations": [], "sha256": sha256, "transferred": transferred, **more}


def measured(after: float, experts=(8, 8), seed: int = 1) -> dict:
    return {
        "source_sha256": WHOLE + str(seed),
        "metric": {"name": "bpc", "lower_is_better": True, "split": "test"},
        "tested_on": "f",
        "before": {
            "experts": [16, 16],
            "parameters": 2_000_000,
            "quality": [{"k": 8, "test": 2.5, "flops_per_token": 5e5}, {"k": 16, "test": BEFORE, "flops_per_token": 1e6}],
        },
        "after": {
            "experts": list(experts),
            "parameters": 100_000 * sum(experts),
            "quality": [{"k": max(experts), "test": after, "flops_per_token": 4e5}],
        },
        "time": [{"k": [16, 8], "ratio": 0.5}, {"k": [8, 8], "ratio": 1.0}],
    }


def went_on(operation: dict, after: float, recovered: float, seed: int = 1, experts=(8, 8), **changes) -> dict:
    """The record of a run trained further after surgery."""
    operated = measured(after, experts, seed)
    size = max(experts)
    more = {"parameters__total": operated["after"]["parameters"], "training__steps": 500, **changes}
    made = record("smoe", seed, {1: 9.0, size: recovered}, size, table="surgery", **more)
    made["pretrained"] = weights("b" * 64, surgery=operated, seed=seed) | {"operations": [operation]}
    return made


def groups_of(records: list[dict]) -> list:
    return surgery_groups([(Path(f"{i}.json"), one) for i, one in enumerate(records)])


def cells(records: list[dict]) -> list[list[str]]:
    (group,) = groups_of(records)
    return [[cell.text for cell in row] for row in build_table(group).rows]


def test_row_has_quality_before_directly_after_and_after_further_training():
    (row,) = cells([went_on(MERGE, 2.4, 2.1)])
    assert row == ["merge 16 to 8 (n = 1)", "8", "2.000", "2.400", "2.100, 500 steps", "–", "2.00 M / 1.60 M", "1.00 M / 16.0 M", "× 0.50"]


def test_the_time_of_compressed_experts_is_that_of_pruned_ones():
    """Directly after compression S is complete, as a note says."""
    old, new = (went_on(COMPRESS | {"options": {"rank": rank}}, 2.0, 2.1) for rank in (4, 8))
    new["pretrained"]["surgery"] |= {"pruned_to": 0.1, "time": [{"k": [16, 8], "ratio": 0.25}]}
    (group,) = groups_of([old, new])
    table = build_table(group)
    assert [row[-1].text for row in table.rows] == ["–", "× 0.25"] and "S still whole" in "".join(table.footnotes)
    (group,) = groups_of([went_on(MERGE, 2.4, 2.1)])
    assert "S still whole" not in "".join(build_table(group).footnotes)


def test_seeds_are_averaged_and_operations_kept_apart():
    found = cells(
        [
            went_on(DROP, 3.2, 2.7, experts=(4, 4)),
            went_on(MERGE, 2.4, 2.1),
            went_on(MERGE, 2.6, 2.3, seed=2),
            went_on(MERGE, 2.4, 2.0, training__steps=1000),
        ]
    )
    assert [row[0] for row in found] == ["merge 16 to 8 (n = 2)", "merge 16 to 8 (n = 1)", "drop 16 to 4 (n = 1)"]
    assert found[0][3:5] == ["2.500 ± 0.141", "2.200 ± 0.141, 500 steps"] and found[1][4] == "2.000, 1,000 steps"


def test_layers_of_different_sizes_are_named_one_by_one():
    assert cells([went_on(MERGE, 2.4, 2.1, experts=(6, 10))])[0][1] == "6, 10"


def test_models_from_scratch_match_in_size_method_and_data():
    operated = went_on(MERGE, 2.4, 2.1)
    scratch = record("smoe", 1, {8: 2.25}, 8, parameters__total=1_600_000, settings={"moe_num_expert": 8})
    larger = record("smoe", 1, {16: 2.0}, 16)
    rival = record("smoe_dropout", 1, {8: 2.2}, 8, parameters__total=1_600_000, settings={"moe_num_expert": 8})
    elsewhere = copy.deepcopy(scratch)
    elsewhere["dataset"]["fingerprint"] = "other"
    went_on_from = copy.deepcopy(scratch)
    went_on_from["pretrained"] = weights("d" * 64)
    assert from_scratch(operated, [scratch, larger, rival, elsewhere, went_on_from]) == [scratch]
    assert cells([operated, scratch, larger, rival, elsewhere])[0][5] == "2.250"


def test_further_training_without_surgery_is_a_note():
    control = record("smoe", 1, {16: 1.9}, 16, training__steps=500)
    control["pretrained"] = weights(WHOLE + "1")
    (group,) = groups_of([went_on(MERGE, 2.4, 2.1), control])
    assert build_table(group).notes[-1] == "500 further steps without surgery: 1.900 (n = 1)."


def test_quality_before_surgery_on_a_task_is_of_the_whole_model_fine_tuned_with_the_same_seed():
    """The smaller model has no quality on the task before it is fine-tuned."""
    task = {
        "metric": {"name": "accuracy", "lower_is_better": False, "split": "dev"},
        "dataset__title": "SST-2",
        "dataset__fingerprint": "s",
    }

    def tuned(made: dict, value: float, sha256: str, transferred: bool = True) -> dict:
        for row in made["quality"]:
            row["dev"] = value
        made["pretrained"] = made.get("pretrained", weights("")) | {"sha256": sha256, "transferred": transferred}
        return made

    operated = tuned(went_on(UNCURL, 2.4, 0.0, **task), 80.0, "b")
    task |= {"training__steps": 500}
    whole = tuned(record("smoe", 1, {16: 0.0}, 16, parameters__total=2_100_000, **task), 82.0, WHOLE + "1")
    scratch = tuned(record("smoe", 1, {16: 0.0}, 16, **task), 70.0, WHOLE + "1", transferred=False)
    other = tuned(record("smoe", 2, {16: 0.0}, 16, **task), 60.0, WHOLE + "2")
    assert before(operated, [scratch, other, whole]) == 82.0 and before(operated, [other]) is None
    (row,) = cells([operated, whole, scratch, other])
    assert row[2:5] == ["82.0", "–", "80.0, 500 steps"] and row[6:8] == ["2.10 M / 1.60 M", "32.0 M / 16.0 M"]
    (alone,) = cells([operated, other])
    assert alone[2] == "–" and alone[6:8] == ["– / 1.60 M", "– / 16.0 M"], "measurements on the text say nothing about the task"


def test_models_from_scratch_on_a_task_are_fine_tuned_alike():
    """It is compared with runs fine-tuned from trained weights for as many steps."""
    task = {"metric": {"name": "accuracy", "lower_is_better": False, "split": "test"}, "dataset__title": "SST-2"}
    operated = went_on(UNCURL, 2.4, 80.0, **task)

    def tuned(value: float, steps: int = 500, transferred: bool = True, **more) -> dict:
        made = record("smoe", 1, {8: value}, 8, training__steps=steps, **task, **more)
        made["pretrained"] = weights(WHOLE + "1", transferred)
        return made

    size = {"parameters__total": 1_600_000}
    small, fresh, longer = tuned(78.0, **size), tuned(50.0, transferred=False, **size), tuned(79.0, 50_000, **size)
    assert from_scratch(operated, [fresh, longer, small]) == [small]
    assert before(operated, [tuned(83.0, 50_000), tuned(60.0, transferred=False), tuned(82.0)]) == 82.0


def test_measurements_on_another_text_are_left_out():
    (row,) = cells([went_on(MERGE, 2.4, 2.1, dataset__fingerprint="other")])
    assert row[2:5] == ["–", "–", "2.100, 500 steps"]


def test_only_replicates_are_averaged():
    one, two = went_on(MERGE, 2.4, 2.1), went_on(MERGE, 2.6, 2.3, seed=2)
    assert cells([one, copy.deepcopy(one), two])[0][0] == "merge 16 to 8 (n = 2)", "a record found twice counts once"
    with pytest.raises(UserError, match=r"seed 1 of 'SMoE .learned router.' is also in 0.json with other content"):
        groups_of([one, went_on(MERGE, 2.4, 2.2)])
    for name, value in (("preset_settings", {"lr": 0.1}), ("settings", {"moe_prune_to": 0.1})):
        assert [row[0] for row in cells([one, overwrite(copy.deepcopy(two), name, value)])] == ["merge 16 to 8 (n = 1)"] * 2
    trained_longer = copy.deepcopy(two)
    trained_longer["pretrained"]["operations"].append({"method": "train", "steps": 500})
    assert [row[0] for row in cells([one, trained_longer])] == ["merge 16 to 8 (n = 1)", "merge 16 to 8, trained 500 steps (n = 1)"]
    with pytest.raises(UserError, match="leave one out"):
        groups_of([one, went_on(MERGE | {"read": READ | {"k": 4}}, 2.6, 2.3, seed=2)])
    silent = {name: value for name, value in MERGE.items() if name != "read"}
    found = cells([one, went_on(silent, 2.6, 2.3, seed=2)])
    assert found[0][0] == "merge 16 to 8 (n = 2)", "the first records of compressed models do not say what was read"


def test_seeds_are_in_order_and_named_in_the_caption():
    one, two = went_on(MERGE, 2.4, 2.1), went_on(MERGE, 2.6, 2.3, seed=2)
    two["pretrained"]["surgery"]["after"]["experts"] = [7, 9]
    (group,) = groups_of([two, one])
    table = build_table(group)
    assert [record["seed"] for record in group.rows[0].records] == [1, 2]
    assert table.caption.endswith("mean ± sample standard deviation over n seeds (seeds 1, 2).")
    assert build_table(groups_of([one])[0]).caption.endswith("one seed, spread unknown (seed 1).")
    cell = table.rows[0][-1].text
    assert cell.startswith("× ") and cell.count("×") == 1 and "±" in cell


def test_two_trained_models_of_one_seed_are_two_tables():
    one, two, other = (went_on(operation, 2.4, 2.1) for operation in (MERGE, DROP, DROP))
    other["pretrained"]["surgery"]["source_sha256"] = "c" * 64
    groups = groups_of([one, two, other])
    assert [len(group.rows) for group in groups] == [2, 1] and len({group.stem for group in groups}) == 2
    start = "Surgery on SMoE (learned router), model cccc, pre-trained on Words, laptop, 10 steps: test bpc"
    assert build_table(groups[1]).caption.startswith(start)


def test_a_figure_is_drawn_and_is_the_same_again(tmp_path):
    records = [went_on(MERGE, 2.4, 2.1), went_on(DROP, 3.2, 2.7, experts=(4, 4))]
    (group,) = groups_of([*records, record("smoe", 1, {8: 2.25}, 8, parameters__total=1_600_000)])
    figures.draw_surgery(group, tmp_path / "one.png"), figures.draw_surgery(group, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes() != b""


def test_a_curve_is_named_after_all_operations_of_its_rows():
    """The training between operations is not named."""
    both = went_on(MERGE, 2.4, 2.1)
    both["pretrained"]["operations"] += [{"method": "train", "steps": 500}, COMPRESS]
    (group,) = groups_of([both, went_on(UNCURL, 2.3, 2.2)])
    found = curves(group, directly=False)
    assert found == {"merge + compress": [(1.6, 2.1, 0.0)], "UNCURL": [(1.6, 2.2, 0.0)]}


def test_runs_are_collected_and_rendered_between_the_markers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, made in (
        ("a", went_on(MERGE, 2.4, 2.1)),
        ("b", record("smoe", 1, {8: 2.2}, 8, parameters__total=1_600_000)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(made))
    (tmp_path / "page.md").write_text("before\n<!-- surgery:begin -->\n<!-- surgery:end -->\nafter\n")
    main(["surgery", "--collect", "a", "b"])
    main(["surgery", "--page", "page.md"])
    text = (tmp_path / "page.md").read_text()
    assert "| merge 16 to 8 (n = 1) | 8 | 2.000 | 2.400 | 2.100, 500 steps | 2.200 |" in text and text.endswith("after\n")
    shown = [line for line in text.split("-->\n")[1].split("\n<!--")[0].split("\n\n") if not line.startswith("![")]
    assert "\n\n".join(shown) == capsys.readouterr().out.strip()
    stored = {str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").rglob("*.json")}
    assert stored == {"surgery/merge-8/enwik8-prefix-laptop-aaaa-seed1.json", "surgery/smoe/enwik8-prefix-laptop-seed1.json"}
    (tmp_path / "a" / "result.json").write_text(json.dumps(went_on(MERGE, 2.4, 2.2)))
    assert "holds another run" in refusal(["surgery", "--collect", "a"], capsys)


def test_missing_records_of_surgery_are_refused(tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(record()))
    said = refusal(["surgery", "--results", str(tmp_path)], capsys)
    assert "no complete record for 'surgery'; finish a run that starts from surgery first" in said
