"""Every architecture of the matrix is converted in one call, or refused with the right reason; docs/architectures.md says the same."""

import pytest

from tests.library.architectures import ARCHITECTURES
from tests.library.matrix import COLUMNS, HEADER, PAGE, ROWS, outcome, row, unavailable


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    """The page has the row that the results give."""
    architecture = ARCHITECTURES[name]
    if package := unavailable(architecture):
        pytest.skip(f"{package} cannot be imported")
    cells = outcome(name)
    if architecture.refused is not None:
        assert architecture.refused in cells["refused"]
        if architecture.refused == "adopt":
            assert cells["adopted"] == "yes" or architecture.said.rpartition(": ")[2] in cells["adopted"]
    else:
        assert "refused" not in cells, cells
        assert int(cells["FFNs"]) == architecture.networks
        failed = {column: cells[column] for column in COLUMNS if cells[column] not in ("yes", "–")}
        assert not failed
    assert name not in ROWS or row(name) in PAGE.read_text().splitlines()


def test_page_has_these_rows_only():
    text = PAGE.read_text()
    assert text.startswith(HEADER)
    assert [line.split("|")[1].strip() for line in text.removeprefix(HEADER).splitlines()] == list(ROWS)
    converted = [architecture for architecture in ROWS.values() if architecture.refused is None]
    assert len(converted) >= 45
