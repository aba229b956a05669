"""The pages: examples run word for word, links resolve, every figure is shown, and flags and scripts that pages name exist."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_dropout.registry import METHODS, ROUTERS, SURGERIES
from tests.conftest import ROOT

PAGES = sorted(
    path for folder in (".", "docs", "data", "results", "tests") for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"https?:|mailto:", target)]


def test_the_readme_is_short_and_begins_with_what_it_is():
    assert len(README.encode()) <= 9216
    first_screen = README.splitlines()[:20]
    assert first_screen[0] == "# SMoE-Dropout" and "bash script/quickstart.sh" in "\n".join(first_screen)


def test_the_layout_stands_in_the_top_third_and_names_what_is_there():
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("train.py  finetune.py"))
    tree = lines[first : lines.index("```", first)]
    assert first + len(tree) <= len(lines) / 3 + 8
    for line in tree:
        for word in re.split(r"\s{3,}", line)[0].split():
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name(page)}: {target}"


def test_every_figure_is_shown_on_a_page():
    figures = {path for folder in ("Figs", "results") for path in (ROOT / folder).rglob("*.png")}
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert figures and not {name(path) for path in figures - shown}


def test_figure_and_record_paths_are_short():
    assert not [path for path in (ROOT / "Figs").rglob("*.png") if len(name(path)) > 50]
    assert not [path for path in (ROOT / "results").rglob("*.json") if len(name(path)) > 80]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_of_training_commands_exist(page):
    """Every --flag given to train.py, finetune.py or a script of theirs."""
    from utils.flags.fields import FinetuneFlags

    known = {field.name for field in dataclasses.fields(FinetuneFlags)}
    for line in page.read_text(encoding="utf-8").splitlines():
        if re.search(r"python (train|finetune)\.py|script/(table1|figure5|table2|ablation)/", line):
            for flag in re.findall(r"--([\w-]+)", line.replace("torchrun --nproc_per_node", "")):
                assert flag.replace("-", "_") in known, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_that_are_named_exist(page):
    for script in re.findall(r"bash (script/[\w/.]+\.sh)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).exists(), f"{name(page)}: {script}"


def example(marker: str) -> str:
    """A block of ten lines between two markers of the README."""
    code = re.search(rf"<!-- {marker}:begin -->\n```python\n(.*?)```\n<!-- {marker}:end -->", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) == 10
    return code


def output_of(code: str, folder: Path) -> str:
    """Runs code in a process that sees the library and nothing else of this repository."""
    (folder / "smoe_dropout").symlink_to(ROOT / "smoe_dropout")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plug_in_example(tmp_path):
    """Runs word for word."""
    assert output_of(example("plug-in"), tmp_path).strip() == "torch.Size([1, 64])"


def test_transformers_example(tmp_path):
    """Runs word for word; the saved model loads in another process."""
    pytest.importorskip("transformers")
    loss = output_of(example("transformers"), tmp_path).splitlines()[-1]
    assert 0 < float(loss) < 10
    load = "import smoe_dropout as sd; model = sd.from_pretrained('out/experts'); print(sd.get_top_k(model), len(sd.moe_layers(model)))"
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "16 2"


def test_tutorial(tmp_path):
    """The blocks of docs/plug_in.md run one after the other, and the numbers it promises hold."""
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plug_in.md").read_text(encoding="utf-8"), re.DOTALL)
    files = [block for block in blocks if re.match(r"# \w+_router\.py\n", block)]
    assert len(files) == 2
    for block in files:
        (tmp_path / block.split()[1]).write_text(block)
    lines = output_of("\n".join(block for block in blocks if block not in files), tmp_path).splitlines()
    text = "\n".join(lines)
    assert "GPT2LMHeadModel: 2 of 3 feed-forward networks to be converted" in text and "0-2.mixer: 32 -> 128 -> 32, silu" in text
    distances = [float(line.split("(")[1].split(",")[0]) for line in lines if line.startswith("tensor(") and "Max" in line]
    split, at_half, own, adopted = distances
    assert max(split, own, adopted) < 1e-5 < at_half
    assert "[(4, 6), (8, 8), (8, 8)]" in lines and "torch.Size([1, 24])" in lines
    assert lines.count("True") == 2 and lines[-1].endswith("tensor(True)")


def test_choosing_k(tmp_path):
    """The blocks of docs/choosing_k.md run one after the other, what they print is right, and every price is served at its k."""
    page = (ROOT / "docs" / "choosing_k.md").read_text(encoding="utf-8")
    *blocks, server = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(server.strip().splitlines()) == 10
    check = "for (price, k), found in zip(PRICES.items(), answers):\n"
    check += "    with sd.top_k(model, k): print(price, torch.allclose(found, model(torch.ones(1, 64)), atol=1e-6))\n"
    check += "print(torch.allclose(answers[0], answers[2], atol=1e-3))\n"
    lines = output_of("\n".join([*blocks, server, check]), tmp_path).splitlines()
    assert lines[0] == "{'0': 9.0, '1': 9.0, '2': 9.0}" and lines[1] == "8"
    assert lines[2].startswith("k = ") and lines[3] == "True True"
    assert lines[4:] == ["basic True", "standard True", "best True", "False"]


def test_the_architecture_page_names_code_that_exists():
    """Every `file.py` and `file.py: name` on it; names are defined in that file."""
    named = re.findall(r"`((?:\w+/)*\w+\.py)(?:: ([\w.]+))?`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, symbol in named:
        found = [ROOT / folder / file for folder in ("", "utils", "utils/reporting", "smoe_dropout") if (ROOT / folder / file).exists()]
        assert found, file
        symbol = symbol.rpartition(".")[2]
        assert not symbol or re.search(rf"\b(def|class) {symbol}\b|^{symbol}\b", found[0].read_text(), re.MULTILINE), f"{file}: {symbol}"


def test_every_method_router_and_operation_has_a_row_that_says_what_differs():
    """Its name is in the first cell of a row of docs/fidelity.md."""
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert not {*METHODS, *ROUTERS, *SURGERIES} - named
