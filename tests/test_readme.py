"""The README: its plug-in example runs as it stands, and what it names is there."""

import re
import subprocess
import sys

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_plug_in_example(tmp_path):
    """Word for word, in a process that sees the library and nothing else of this repository."""
    code = re.search(r"<!-- plug-in:begin -->\n```python\n(.*?)```\n<!-- plug-in:end -->", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) == 10
    (tmp_path / "smoe_dropout").symlink_to(ROOT / "smoe_dropout")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 64])"


def test_scripts_and_pictures_are_there():
    named = re.findall(r"bash (script/\S+\.sh)", README) + re.findall(r"\]\(((?:Figs|results)/\S+)\)", README)
    assert len(named) > 8
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_flags_are_known():
    """Every --flag that the README gives to train.py or a script is one."""
    import dataclasses

    from utils.flags import Flags

    known = {field.name for field in dataclasses.fields(Flags)}
    count = 0
    for line in README.splitlines():
        if "train.py" in line or "script/table1" in line or "script/figure5" in line:
            for flag in re.findall(r"--([\w-]+)", line.replace("torchrun --nproc_per_node", "")):
                assert flag.replace("-", "_") in known, line
                count += 1
    assert count > 5


def test_tables_are_rendered_from_the_records():
    """The text between the markers is what the report makes of the committed records now."""
    from utils import report
    from utils.records import PUBLISHED, find_records, group_records, load_records

    groups = group_records(load_records(find_records([ROOT / "results" / "table1"], []), "table1"))
    entries = report.json.loads(PUBLISHED.read_text(encoding="utf-8"))["entries"]
    text = "\n\n".join(report.to_markdown(report.build_table(group, "table1", entries)) for group in groups)
    between = README.split("<!-- table1:begin -->\n")[1].split("\n<!-- table1:end -->")[0]
    assert between == text


def test_benchmarks_are_rendered_from_the_records():
    from benchmarks.tables import render

    between = README.split("<!-- benchmarks:begin -->\n")[1].split("\n<!-- benchmarks:end -->")[0]
    assert between == render(ROOT / "results" / "benchmarks")
