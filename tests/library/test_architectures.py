"""Every architecture of the matrix is converted in one call, or refused with the right reason; docs/architectures.md says the same."""

import pytest

from tests.library.architectures import ARCHITECTURES
from tests.library.matrix import COLUMNS, HEADER, PAGE, outcome, row, unavailable

# models whose own save_pretrained renames weights, or leaves some out
RENAMED = ("GPT-NeoX", "ESM", "Marian", "AST", "ViT", "DeiT", "BEiT", "DINOv2", "DINOv2 (SwiGLU)", "Swin", "DETR", "LLaVA")
FAILING = {"Trainer's folder": RENAMED}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    """The page has the row that the results give."""
    architecture = ARCHITECTURES[name]
    if package := unavailable(architecture):
        pytest.skip(f"{package} cannot be imported")
    cells = outcome(name)
    if architecture.refused is not None:
        assert architecture.refused in cells["refused"]
    else:
        assert "refused" not in cells, cells
        assert int(cells["FFNs"]) == architecture.networks
        failed = {column: cells[column] for column in COLUMNS if cells[column] not in ("yes", "–")}
        assert failed.keys() == {column for column, names in FAILING.items() if name in names}, failed
    assert row(name) in PAGE.read_text().splitlines()


def test_page_has_these_rows_only():
    text = PAGE.read_text()
    assert text.startswith(HEADER)
    assert [line.split("|")[1].strip() for line in text.removeprefix(HEADER).splitlines()] == list(ARCHITECTURES)
    converted = [architecture for architecture in ARCHITECTURES.values() if architecture.refused is None]
    assert len(converted) >= 45
