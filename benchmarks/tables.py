"""Records as Markdown tables, for the terminal and, by `python -m benchmarks.tables`, for README.md. Imports no torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.errors import UserError, run_main
from utils.report import update_readme

RECORDS = Path("results/benchmarks")


def markdown(record: dict[str, Any]) -> str:
    """What was measured and where, and a table."""
    return {"layer": layer_table, "step": step_table, "data": data_table}[record["benchmark"]](record)


def layer_table(record: dict[str, Any]) -> str:
    """A table for each precision: rows ways, columns k, cells time over dense; then what is kept for the backward pass."""
    sizes = record["sizes"]
    what = f"{sizes['num_experts']} experts {sizes['d_model']} -> {sizes['d_expert']} -> {sizes['d_model']}, {sizes['tokens']:,} tokens"
    dropout = f", dropout {sizes['dropout']:g}" if sizes["dropout"] else ""
    lines = [f"One expert layer, forward and backward, time over the dense network of equal parameters: {what}{dropout}. {_where(record)}"]
    for precision in dict.fromkeys(row["precision"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["precision"] == precision]
        ks = [f"k = {row['k']}" for row in rows]
        lines += ["", *_head([precision, *ks, "kept for backward, MiB"])]
        for name in rows[0]["results"]:
            results = [row["results"][name] for row in rows]
            kept = " / ".join(f"{result['kept_mib']:.0f}" for result in results)
            lines.append(_line([name, *(f"{result['ratio']:.2f}" for result in results), kept]))
    return "\n".join(lines)


def step_table(record: dict[str, Any]) -> str:
    """Rows models, a group for each precision."""
    sizes, baseline = record["sizes"], record["baseline"]
    what = f"{sizes['n_layer']} layers, d {sizes['d_model']}, {sizes['num_experts']} experts of {sizes['d_expert']}, k = {sizes['k']}"
    batch = f"batch {sizes['batch_size']} x {sizes['tgt_len']} with as much memory"
    dropout = f"dropout {sizes['dropout']:g}" if sizes["dropout"] else "no dropout"
    lines = [f"One training step (forward, backward, clipping, Adam): {what}, {batch}, {dropout}. {_where(record)}", ""]
    lines += _head(["", "precision", f"time over {baseline}", "times as fast", "kept for backward, MiB"])
    for row in record["rows"]:
        for name, result in row["results"].items():
            cells = [f"{result['ratio']:.2f}", f"{1 / result['ratio']:.2f}", f"{result['kept_mib']:.0f}"]
            lines.append(_line([name, row["precision"], *cells]))
    return "\n".join(lines)


def data_table(record: dict[str, Any]) -> str:
    """Rows processes, with seconds."""
    results = record["rows"][0]["results"]
    lines = [f"Fresh processes, median seconds. {_where(record)}", "", *_head(["", "seconds"])]
    return "\n".join([*lines, *(_line([name, f"{result['seconds']:.2f}"]) for name, result in results.items())])


def _where(record: dict[str, Any]) -> str:
    env = record["environment"]
    commit, changed, _ = (env["commit"] or "unknown").partition("+")
    code = f"commit {commit[:9]}{' with changes' if changed else ''}"
    threads = "" if record["benchmark"] == "data" else f", {env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    machine = f"{env['device_name']} ({env['cores']} cores{threads})"
    return f"Median of {record['sizes']['rounds']} interleaved rounds on {machine}, torch {env['torch']}, {code}."


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---", *["--:"] * (len(cells) - 1)])]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render(records: Path = RECORDS) -> str:
    """The tables of all committed records, in the order a reader wants them. UserError if there is none."""
    found = [
        json.loads((records / f"{name}.json").read_text()) for name in ("step", "layer", "data") if (records / f"{name}.json").exists()
    ]
    if not found:
        raise UserError(f"{records} holds no benchmark record: run `python -m benchmarks step` first")
    return "\n\n".join(map(markdown, found))


if __name__ == "__main__":
    run_main(lambda: update_readme(Path("README.md"), "benchmarks", render()))
