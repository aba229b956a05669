"""The structure of the code: imports point one way, nothing is circular, names are unique, files are short, and a method is known only by
its file and its registry line.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS, load
from tests.conftest import ROOT

LIBRARY = sorted((ROOT / "smoe_dropout").rglob("*.py"))
HARNESS = sorted((ROOT / "utils").rglob("*.py"))
PROGRAMS = [ROOT / f"{name}.py" for name in ("train", "finetune", "surgery", "generate")]
MODEL, SINGLE_POSITION = ROOT / "mem_transformer.py", ROOT / "smoe_dropout" / "single_position.py"
BESIDE = sorted([*(ROOT / "data").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
CODE = [*PROGRAMS, MODEL, SINGLE_POSITION, *HARNESS, *LIBRARY, *BESIDE]
# the rooms of utils, lowest first: a room imports from those below it
ROOMS = (
    "errors",
    "formatting",
    "documents",
    "data",
    "flags",
    "checkpoints",
    "models",
    "engine",
    "tasks",
    "training",
    "reporting",
    "microscope",
    "doctor",
    "cli",
)
CORE = [path for path in LIBRARY if path.parent.name != "methods" and path.name != "registry.py"]
DYNAMIC_IMPORTS = ("importlib.import_module", "import_module", "__import__")
PACKAGE = "smoe_dropout"  # also the name of a method: fine in imports and prose, not as a value
# method names that are also ordinary words: "dense", the key under which a model without k is recorded, a value of --output_scale, and what
# BERT calls a linear layer; "attention", what a layer may need of its host, and a place of dropout; "elastic", a schedule of k
ENGLISH = {
    "dense": {"record.py", "recipe.py", "figures.py", "evaluation.py", "layer.py", "config.py", "io.py", "intermediate_output.py"},
    "attention": {"conversion.py", "mem_transformer.py", "fields.py"},
    "elastic": {"schedule.py"},
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in CODE}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports anywhere, `from package import module` resolved."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}, line {node.lineno}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES]
            yield from submodules
            if len(submodules) < len(node.names):
                yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC_IMPORTS and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def top_level(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported(path)}


IMPORTS = {module: {found for found in imported(path) if found in MODULES} - {module} for module, path in MODULES.items()}


def test_there_is_no_import_circle():
    """Imports in functions and for type checkers count."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(module: str) -> None:
        assert state.get(module) != 1, " -> ".join([*trail[trail.index(module) :], module])
        if module in state:
            return
        state[module] = 1
        trail.append(module)
        for following in sorted(IMPORTS[module]):
            visit(following)
        trail.pop()
        state[module] = 2

    for module in IMPORTS:
        visit(module)


def test_rooms_of_utils_import_downwards():
    for path in (path for path in HARNESS if path.parent != ROOT / "utils" or path.stem in ROOMS):
        room = path.relative_to(ROOT / "utils").parts[0].removesuffix(".py")
        rooms = {module.split(".")[1] for module in imported(path) if module.startswith("utils.")}
        above = [other for other in rooms if ROOMS.index(other) > ROOMS.index(room)]
        assert not above, f"{name(path)} imports from {above}, which are above {room}"


def test_utils_imports_neither_programs_nor_what_stands_beside_it():
    for path in HARNESS:
        assert not top_level(path) & {"train", "finetune", "surgery", "generate", "tests", "data", "benchmarks"}, name(path)


def test_the_library_stands_alone():
    known = {"torch", "safetensors", "numpy", "scipy", "transformers", "fmoe", "triton", PACKAGE}
    for path in LIBRARY:
        assert top_level(path) - set(sys.stdlib_module_names) <= known, name(path)


def test_the_model_imports_torch_and_products_for_generation_alone():
    assert {name for name in imported(MODEL) if name.split(".")[0] not in sys.stdlib_module_names} <= {
        "torch",
        "torch.nn.functional",
        f"{PACKAGE}.single_position",
    }
    assert top_level(SINGLE_POSITION) - set(sys.stdlib_module_names) == {"torch"}


def test_the_model_has_no_word_of_experts_in_its_code():
    found = [getattr(node, part, None) for node in ast.walk(tree_of(MODEL)) for part in ("id", "attr", "arg", "name")]
    names = {word for word in found if isinstance(word, str)}
    assert not [word for word in names if "expert" in word.lower() or "moe" in word.lower() or "router" in word.lower()]


def test_module_names_in_utils_are_unique():
    names = [path.stem for path in HARNESS if path.stem != "__init__"]
    assert not {stem for stem in names if names.count(stem) > 1}


def test_no_file_is_over_400_lines():
    assert not [name(path) for path in CODE if len(path.read_text().splitlines()) > 400]


def test_utils_stays_small():
    """The last 1,700 lines are for verified files: checksums, schemas, the doctor, and one sentence for each wrong input; 610 are for
    models of transformers, 540 for the microscope, 210 for claims and studies of long training, 260 for large vocabularies, 220 for
    attentions and lengths of the official Transformer-XL, 170 for texts of words and corrupted input.
    """
    assert sum(len(path.read_text().splitlines()) for path in HARNESS) <= 11210


def test_docstrings_open_with_a_verb_or_a_noun():
    """Not with "Of ...", "What ..." or "Whether ...", which say nothing on their own."""
    for path in (*CODE, *sorted((ROOT / "tests").rglob("*.py"))):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                where = f"{name(path)}, {getattr(node, 'name', 'module')}"
                assert text.split()[0] not in ("Of", "What", "Whether", "Whether,"), f"{where}: {text.splitlines()[0]}"


def test_constants_are_named_after_what_they_hold():
    """A set of flags is MODEL_FLAGS, not OF_THE_MODEL."""
    for path in CODE:
        for node in tree_of(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                words = ast.unparse(target).strip("_").split("_")
                assert words[0] not in ("OF", "TO", "SAID"), f"{name(path)}: {ast.unparse(target)}"


def test_no_method_is_named_outside_its_file_and_the_registry():
    """Neither as a string in code (docstrings may mention methods), nor by importing its module."""
    modules = {place.partition(":")[0] for place in METHODS.values()}
    for path in (*PROGRAMS, MODEL, *HARNESS, *CORE):
        tree = tree_of(path)
        bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
        prose = {id(s.value) for body in bodies for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}
        named = [
            f"line {node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in METHODS and id(node) not in prose
            if path.name not in ENGLISH.get(node.value, ())
        ]
        named += [f"import {module}" for module in imported(path) if module in modules]
        assert not named, f"{name(path)} names a method: {named}; take it from smoe_dropout.registry"


def test_nothing_is_decided_by_comparing_a_method_name():
    """There is no `if method == "dense"`."""
    for path in (*PROGRAMS, MODEL, *HARNESS):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Compare) and any("method" in ast.unparse(side) for side in (node.left, *node.comparators)):
                compared = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not compared & METHODS.keys(), f"{name(path)}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_file_with_its_name(method):
    assert METHODS[method] == f"smoe_dropout.methods.{method}:METHOD" and load(METHODS, "method", method).name == method
    others = {path.stem for path in (ROOT / "smoe_dropout" / "methods").glob("*.py")} - {"__init__", "base"}
    assert others == set(METHODS)
    modules = {place.partition(":")[0] for place in METHODS.values()}
    assert not modules & set(imported(ROOT / "smoe_dropout" / "methods" / f"{method}.py")), "a method needs another one"
