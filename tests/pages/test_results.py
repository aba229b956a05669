"""The pages of results/: tables rendered from records of the current schema under their canonical paths, and the figures they show."""

import re
from pathlib import Path

import pytest

from benchmarks.slimmable_table import render as render_slimmable
from benchmarks.slimmable_tasks import render as render_tasks
from benchmarks.tables import render as render_benchmarks
from benchmarks.tradeoff_table import render as render_tradeoff
from benchmarks.vision_page import load as load_vision
from benchmarks.vision_page import render as render_vision
from tests.conftest import ROOT
from utils import documents
from utils.reporting.__main__ import TABLES, build_tables, place, render
from utils.reporting.labels import method_label, operations_label, preset_label, training_label
from utils.reporting.pages import rendered
from utils.reporting.published import elsewhere
from utils.reporting.records import PUBLISHED, read_record

MEASURED = ("benchmarks", "slimmable", "tradeoff", "vision")  # folders of records that programs of benchmarks/ write
RECORDS = [path for path in (ROOT / "results").rglob("*.json") if path != PUBLISHED and not {*MEASURED} & {*path.relative_to(ROOT).parts}]
PAGES = sorted((ROOT / "results").glob("*/page.md"))
FIGURES = sorted((ROOT / "Figs").rglob("*.png"))
SHOWN = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@pytest.mark.parametrize("table", TABLES)
def test_records_are_of_the_current_schema_and_have_their_canonical_paths(table):
    paths = [path.relative_to(ROOT) for path in RECORDS if path.relative_to(ROOT / "results").parts[0] == table]
    assert len(paths) > 5
    for path in paths:
        record = read_record(ROOT / path)
        assert str(path) == f"results/{place(record, table)}" and len(str(path)) <= 80


def test_every_committed_record_is_sealed():
    """No number of a page can be changed by hand: a record without a checksum, or with a wrong one, is refused here."""
    measured = [path for folder in MEASURED for path in sorted((ROOT / "results" / folder).rglob("*.json"))]
    assert len(RECORDS) > 200 and len(measured) > 8
    unverified = []
    for path in [*RECORDS, *measured]:
        documents.read(path, dict, "collect it again", unverified.append)
    assert not unverified


def test_labels_are_words():
    for path in RECORDS:
        record = read_record(path)
        start = record.get("pretrained")
        labels = [method_label(record), preset_label(record["preset"], record["preset_settings"])]
        labels += [training_label(start), operations_label(start["operations"])] if start else []
        assert not [label for label in labels if re.search("[=_]", label)], path


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_rendered_from_the_records(table):
    tables = [*build_tables(table, [ROOT / "results" / source for source in TABLES[table].sources]), *elsewhere(table)]
    assert rendered(ROOT / "results" / table / "page.md", table) == render(table, tables, "../../Figs")


def test_benchmarks_are_rendered_from_the_records():
    assert rendered(ROOT / "results" / "benchmarks" / "page.md", "benchmarks") == render_benchmarks(ROOT / "results" / "benchmarks")


def test_the_page_of_quality_against_cost_is_rendered_from_the_records():
    assert rendered(ROOT / "results" / "tradeoff" / "page.md", "tradeoff") == render_tradeoff(ROOT / "results" / "tradeoff")
    assert rendered(ROOT / "results" / "slimmable" / "page.md", "slimmable") == render_slimmable(ROOT / "results" / "slimmable")
    assert rendered(ROOT / "results" / "slimmable" / "page.md", "tasks") == render_tasks(ROOT / "results" / "slimmable")


def test_the_page_of_vision_is_rendered_from_the_records():
    folder = ROOT / "results" / "vision"
    assert rendered(folder / "page.md", "vision") == render_vision(load_vision(folder.glob("*.json")))


def test_a_footnote_stands_once_on_a_page():
    for page in PAGES:
        lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
        assert len({*lines}) == len(lines), page


def test_every_figure_is_shown_and_every_picture_is_there():
    pages = [*PAGES, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {(page.parent / name).resolve() for page in pages for name in SHOWN.findall(page.read_text(encoding="utf-8"))}
    assert not [path for path in shown if not path.exists()]
    assert not [path for path in [*FIGURES, *(ROOT / "results").rglob("*.png")] if path.resolve() not in shown]
    assert not [path for path in FIGURES if len(str(path.relative_to(ROOT))) > 50]


def test_every_finding_links_to_its_page():
    rows = [line for line in (ROOT / "results" / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    linked = {ROOT / "results" / Path(re.search(r"\]\((\S+)\)", row)[1]) for row in rows}
    assert linked == {*PAGES}


def test_the_table_of_the_readme_is_made_of_records():
    """Each of its numbers is the mean over the seeds of a row of Table 1."""
    rows = {
        "Dense, equal parameters": "dense",
        "SMoE, learned router": "smoe",
        "SMoE, learned router, output times E": "smoe-times-e",
        "SMoE-Dropout, as published": "smoe_dropout",
        "SMoE-Dropout, output times E": "smoe_dropout-times-e",
        "Elastic k, output times E (ours)": "elastic-times-e",
        "Elastic k, learned router, output times E (ours)": "elastic-trained-router-times-e",
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for label, folder in rows.items():
        records = [read_record(path) for path in (ROOT / "results/table1" / folder).glob("enwik8-prefix-laptop-seed*.json")]
        assert len(records) == 3
        by_k = {k: [row["test"] for record in records for row in record["quality"] if row["k"] == k] for k in (None, 8, 16)}
        half, full = by_k[8], by_k[16] or by_k[None]
        cells = " | ".join(f"{sum(values) / len(values):.3f}" if values else "–" for values in (half, full))
        assert f"| {label} | {cells} |" in readme, (label, cells)
