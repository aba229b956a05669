"""The record of the microscope, microscope.json, and its verification. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from utils import documents
from utils.documents import Content, Count, Damaged

PAGE, RECORD = "microscope.html", "microscope.json"
REMEDY = "restore it from a copy, or examine the model again"


class Layer(Struct):
    """The measurements of a layer that a page needs; docs/microscope.md defines them."""

    name: str
    experts: Count
    load: list[float]
    load_entropy: float


class Examined(Struct):
    """The parts of microscope.json by which it is recognised; it holds more."""

    kind: Literal["run", "model"]
    subject: dict[str, Any]
    text: dict[str, Any]
    tokens: Count
    findings: list[str]
    layers: list[Layer]
    by_k: list[dict[str, Any]]
    page: Content


def read_examination(folder: Path) -> dict[str, Any]:
    """The record in a folder of the microscope. Damaged unless it and the page are intact."""
    record, page = documents.read(folder / RECORD, Examined, REMEDY), folder / PAGE
    if not page.is_file() or documents.content_of(page) != record["page"]:
        raise Damaged(page, "is missing" if not page.is_file() else f"is damaged: its size or sha256 differs from {RECORD}", REMEDY)
    return record
