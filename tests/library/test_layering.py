"""Imports inside the library point one way, including those in functions and under TYPE_CHECKING."""

import ast
import graphlib
from pathlib import Path

from tests.conftest import ROOT

# lowest first; a part may import itself and those of lower floors
FLOORS = (
    ("registry",),
    ("options",),
    ("arguments", "files", "folders", "selection", "single_position"),
    ("manifest", "schedule", "training", "shared", "recomputation", "tuning", "precision", "regression"),
    ("config", "attention"),
    ("experts", "cuts"),
    ("routers",),
    ("layer",),
    ("native", "competition"),
    ("control", "hosts"),
    ("methods", "checks", "decay", "slimming", "adapters"),
    ("passes",),
    ("conversion", "restoration", "io", "surgery", "sampling"),
    ("hf", "summary", "planning"),
    ("recipe", "microscope"),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in (ROOT / "smoe_dropout").rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Modules of the library that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{alias.name}") in PATHS else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & PATHS.keys()


def test_no_circular_imports():
    order = list(graphlib.TopologicalSorter({module: imported(path) for module, path in PATHS.items()}).static_order())
    assert len(order) == len(PATHS)


def test_imports_point_to_lower_floors():
    parts = {module: module.split(".")[1] for module in PATHS if "." in module}
    assert set(parts.values()) == set(FLOOR_OF)
    wrong = [
        f"{module} imports {other}"
        for module, part in parts.items()
        for other in imported(PATHS[module])
        if parts[other] != part and FLOOR_OF[parts[other]] >= FLOOR_OF[part]
    ]
    assert not wrong
