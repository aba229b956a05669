"""Shared by all tests: the repository's root, and the folder of reference vectors."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("REFERENCE_DIR", ROOT / "tests" / "reference"))


def pytest_collection_modifyitems(items):
    """The scripts first: their tests take longest, and no process shall end long after the others."""
    items.sort(key=lambda item: "scripts" not in item.path.parts)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A folder to prepare data in, downloads from this machine allowed."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on small tensors only wait for each other."""
    torch.set_num_threads(1)
