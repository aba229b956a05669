"""The house's rules: dependencies point one way, and a method is known by its file and its line in the registry only."""

import ast
import sys
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS
from tests.conftest import ROOT

LIBRARY = sorted((ROOT / "smoe_dropout").rglob("*.py"))
CORE = [path for path in LIBRARY if path.parent.name != "methods" and path.name != "registry.py"]
HARNESS = sorted((ROOT / "utils").rglob("*.py"))
EXPERIMENTS = [ROOT / name for name in ("train.py", "finetune.py", "surgery.py", "generate.py")]
MODEL = ROOT / "mem_transformer.py"
OURS = {"smoe_dropout", "utils", "train", "finetune", "mem_transformer", "tests", "data", "benchmarks", "script"}

# names of methods that are words besides: "dense" is the key under which a model without k is recorded and plotted, and a value of
# output_scale, and how BERT calls a linear map; "attention" what a layer may need of its host; "elastic" a schedule of k
ENGLISH = {
    "dense": {"record.py", "figures.py", "evaluation.py", "layer.py", "config.py", "io.py", "intermediate_output.py"},
    "attention": {"conversion.py"},
    "elastic": {"schedule.py"},
}
# the name of the project and of its Python package is also the name of one method: fine in imports and prose, not as a value
PACKAGE = "smoe_dropout"


def imports(path: Path) -> set[str]:
    """Top-level names of everything imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0] if not node.level else path.relative_to(ROOT).parts[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            argument = node.args[0]
            found |= {argument.value.partition(".")[0]} if isinstance(argument, ast.Constant) else set()
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_imports_nothing_of_the_experiments(path):
    assert imports(path) & OURS <= {PACKAGE}
    known = {"torch", "safetensors", "numpy", "scipy", "transformers", "fmoe", "triton", PACKAGE}
    assert imports(path) - set(sys.stdlib_module_names) <= known


def test_the_model_imports_torch_alone():
    assert imports(MODEL) - set(sys.stdlib_module_names) == {"torch"}


def test_the_model_has_no_word_of_experts_in_its_code():
    found = [getattr(node, part, None) for node in ast.walk(ast.parse(MODEL.read_text())) for part in ("id", "attr", "arg", "name")]
    names = {word for word in found if isinstance(word, str)}
    assert not [word for word in names if "expert" in word.lower() or "moe" in word.lower() or "router" in word.lower()]


@pytest.mark.parametrize("path", HARNESS, ids=name)
def test_the_harness_does_not_import_the_experiments(path):
    assert not imports(path) & {"train", "finetune", "tests", "data", "benchmarks"}


@pytest.mark.parametrize("path", [*EXPERIMENTS, MODEL, *HARNESS, *CORE], ids=name)
def test_no_method_is_named_outside_its_file_and_the_registry(path):
    """Neither as a string in the code (docstrings may tell of methods), nor by importing its module."""
    tree = ast.parse(path.read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    prose = {id(s.value) for body in bodies for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}
    named = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in METHODS and id(node) not in prose
        if path.name not in ENGLISH.get(node.value, ())
    ]
    modules = {place.partition(":")[0] for place in METHODS.values()}
    named += [
        f"line {node.lineno}: from {node.module} import ..."
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and any(f"{node.module}.{alias.name}" in modules for alias in node.names)
    ]
    named += [f"line {n.lineno}: {a.name}" for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name in modules]
    named += [f"line {n.lineno}: {n.module}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in modules]
    assert not named, f"{name(path)} names a method: {named}; take it from smoe_dropout.registry"


def test_english_exemptions_never_decide_by_method():
    """Nothing is compared with a method's name: no `if method == "dense"`."""
    for path in (*EXPERIMENTS, MODEL, *HARNESS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any("method" in ast.unparse(side) for side in (node.left, *node.comparators)):
                compared = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not compared & METHODS.keys(), f"{name(path)}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_file_named_as_it_is(method):
    from smoe_dropout.registry import load

    assert METHODS[method] == f"smoe_dropout.methods.{method}:METHOD" and load(METHODS, "method", method).name == method
    others = {path.stem for path in (ROOT / "smoe_dropout" / "methods").glob("*.py")} - {"__init__", "base"}
    assert others == set(METHODS)
