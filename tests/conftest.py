"""Shared by all tests: the repository's root, and the folder of reference vectors."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("REFERENCE_DIR", ROOT / "tests" / "reference"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on small tensors only wait for each other."""
    torch.set_num_threads(1)
