"""The README: its plug-in example runs as it stands, and what it names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    code = re.search(rf"<!-- {name}:begin -->\n```python\n(.*?)```\n<!-- {name}:end -->", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) == 10
    return code


def output_of(code: str, folder: Path) -> str:
    """In a process that sees the library and nothing else of this repository."""
    (folder / "smoe_dropout").symlink_to(ROOT / "smoe_dropout")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plug_in_example(tmp_path):
    """Word for word."""
    assert output_of(example("plug-in"), tmp_path).strip() == "torch.Size([1, 64])"


def test_transformers_example(tmp_path):
    """Word for word; the saved model loads in another process."""
    pytest.importorskip("transformers")
    loss = output_of(example("transformers"), tmp_path).splitlines()[-1]
    assert 0 < float(loss) < 10
    load = "import smoe_dropout as sd; model = sd.from_pretrained('out/experts'); print(sd.get_top_k(model), len(sd.moe_layers(model)))"
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "16 2"


def test_tutorial(tmp_path):
    """docs/plug_in.md, its blocks one after the other; what it promises of numbers holds."""
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plug_in.md").read_text(encoding="utf-8"), re.DOTALL)
    files = [block for block in blocks if re.match(r"# \w+_router\.py\n", block)]
    assert len(files) == 2
    for block in files:
        (tmp_path / block.split()[1]).write_text(block)
    lines = output_of("\n".join(block for block in blocks if block not in files), tmp_path).splitlines()
    distances = [float(line.split("(")[1].split(",")[0]) for line in lines if line.startswith("tensor(") and "Max" in line]
    assert len(distances) == 3 and max(distances[0], distances[2]) < 1e-5 < distances[1]
    assert "'*.mixer' (3 modules, 32 -> 128 -> 32)" in "".join(lines)
    assert "[(4, 6), (8, 8), (8, 8)]" in lines and "torch.Size([1, 24])" in lines
    assert "True" in lines and lines[-1].endswith("tensor(True)")


def test_scripts_and_pictures_are_there():
    named = re.findall(r"bash (script/\S+\.sh)", README) + re.findall(r"\]\(((?:Figs|results)/\S+)\)", README)
    assert len(named) > 8
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_flags_are_known():
    """Every --flag that the README gives to train.py or a script is one."""
    import dataclasses

    from utils.flags.fields import FinetuneFlags

    known = {field.name for field in dataclasses.fields(FinetuneFlags)}
    count = 0
    for line in README.splitlines():
        if "train.py" in line or "finetune.py" in line or re.search("script/(table1|figure5|table2|ablation)", line):
            for flag in re.findall(r"--([\w-]+)", line.replace("torchrun --nproc_per_node", "")):
                assert flag.replace("-", "_") in known, line
                count += 1
    assert count > 5


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_tables_are_rendered_from_the_records(table):
    """The text between the markers is what the report makes of the committed records now."""
    from utils.reporting import tables as report
    from utils.reporting.records import PUBLISHED, find_records, group_records, load_records

    groups = group_records(load_records(find_records([ROOT / "results" / table], []), table))
    entries = report.json.loads(PUBLISHED.read_text(encoding="utf-8"))["entries"]
    text = "\n\n".join(report.to_markdown(report.build_table(group, table, entries)) for group in groups)
    between = README.split(f"<!-- {table}:begin -->\n")[1].split(f"\n<!-- {table}:end -->")[0]
    assert between == text


def test_benchmarks_are_rendered_from_the_records():
    from benchmarks.tables import render

    between = README.split("<!-- benchmarks:begin -->\n")[1].split("\n<!-- benchmarks:end -->")[0]
    assert between == render(ROOT / "results" / "benchmarks")
