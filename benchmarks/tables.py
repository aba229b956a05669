"""Records as Markdown tables, for the terminal and, by `python -m benchmarks.tables`, for their page. Imports no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import UNSET, Meta, Struct, UnsetType

from utils import documents
from utils.documents import Count
from utils.errors import UserError, run_main
from utils.reporting.pages import update_page

RECORDS = Path("results/benchmarks")
PAGE = RECORDS / "page.md"
FIGURES = {
    "layer": (
        "time_by_k.png",
        "Time of one expert layer relative to the dense network against k: ours, others, the bound k/E; bars: fastest and slowest round",
    ),
    "growth": (
        "growth.png",
        "Time of the layer against the number of experts, their width and the tokens (k = E/2), and of the attention against memory",
    ),
}


class Line(NamedTuple):
    """A record's rows in the summary: whose time is shown, relative to which dense model, and the peer it is compared with."""

    title: str
    ours: str
    dense: str | None
    peer: str


LINES = {
    "layer": Line("expert layer", "ours: auto", "dense", "fastmoe's way"),
    "attention": Line("attention", "ours", None, "official style"),
    "step": Line("training step", "ours, experts", "ours, dense", "official style, experts"),
    "evaluation": Line("evaluation pass", "ours, experts", "ours, dense", "official style, experts"),
    "generation": Line("generation, cached", "ours, experts, cached", "ours, dense, cached", "ours, experts, uncached"),
}
NOTES = (
    "Time / dense: time relative to the dense model of equal parameters. Bound: operations with k experts relative to the dense model's; "
    "for generation, weights read. % of bound: bound / time; above 100 % where the dense model is computed less efficiently. Peak memory: "
    "the most that torch had allocated at once during a pass, with gradients, without parameters and inputs; ours / the implementation "
    "named in the column before."
)


Positive = Annotated[float, Meta(gt=0)]


class Result(Struct):
    seconds: Positive | UnsetType = UNSET
    ratio: Positive | UnsetType = UNSET
    peak_mib: Annotated[float, Meta(ge=0)] | UnsetType = UNSET


class Row(Struct):
    results: Annotated[dict[str, Result], Meta(min_length=1)]
    precision: str | UnsetType = UNSET
    k: Count | UnsetType = UNSET
    run: str | UnsetType = UNSET
    draft_k: Count | UnsetType = UNSET
    draft_length: Count | UnsetType = UNSET
    drafted: Count | UnsetType = UNSET
    accepted: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    bound: Positive | UnsetType = UNSET
    axis: str | UnsetType = UNSET
    value: Count | UnsetType = UNSET


class Environment(Struct):
    commit: str | None
    device_name: str
    cores: Count
    threads: Count
    torch: str
    tuned: list[str] = []


class Benchmark(Struct):
    """The schema of a record."""

    benchmark: str
    sizes: dict[str, Any]
    rows: Annotated[list[Row], Meta(min_length=1)]
    environment: Environment


def markdown(record: dict[str, Any]) -> str:
    """Work, machine, and a table."""
    tables = {"layer": layer_table, "growth": growth_table, "memory": memory_table, "mixed": mixed_table, "data": data_table}
    tables |= {"speculation": speculation_table, "softmax": softmax_table}
    if record["benchmark"] in tables:
        return tables[record["benchmark"]](record)
    return summary([record]) + ("\n\n" + generation_table(record) if record["benchmark"] == "generation" else "")


def summary(records: Sequence[dict[str, Any]]) -> str:
    """The summary: our time for each precision and k, then the sizes and machines."""
    found = [record for record in records if record["benchmark"] in LINES]
    columns = ["precision", "time / dense", "bound", "% of bound", "speed-up over", "tokens/s", "peak memory, MiB"]
    rows = [_line(_summary_cells(record, row)) for record in found for row in record["rows"]]
    return "\n".join([*_head(["", *columns]), *rows, "", *(f"- {_what(record)} {_where(record)}" for record in found), "", NOTES])


def _summary_cells(record: dict[str, Any], row: dict[str, Any]) -> list[str]:
    line, results = LINES[record["benchmark"]], row["results"]
    ours, peer = results[line.ours], results[line.peer]
    over_dense = ours["ratio"] / results[line.dense]["ratio"] if line.dense else None
    bound = row.get("bound")
    share = f"{100 * bound / over_dense:.0f} %" if bound and over_dense else "–"
    faster = f"{peer['ratio'] / ours['ratio']:.2f} ({line.peer})"
    memory = f"{_number(ours.get('peak_mib'), '.1f')} / {_number(peer.get('peak_mib'), '.1f')}"
    speed = f"{_tokens(record['sizes']) / ours['seconds']:,.0f}"
    at = f", k = {row['k']}" if "k" in row else ""
    return [f"{line.title}{at}", row["precision"], _number(over_dense, ".2f"), _number(bound, ".2f"), share, faster, speed, memory]


def generation_table(record: dict[str, Any]) -> str:
    """Generation by k: what is read, the bound that counts keys and values, too, and experts in 8 bits. Older records have none of it."""
    rows, cells = [row for row in record["rows"] if "mib_read" in row], []
    columns = ["time / dense", "time / k = E", "MiB read: weights / keys, values", "bound with keys, values", "% of it"]
    for row in rows:
        results, (weights, keys) = row["results"], row["mib_read"].values()
        whole = [one["results"] for one in rows if (one["k"], one["precision"]) == (record["sizes"]["num_experts"], row["precision"])]
        ours, int8 = (results[f"ours, {kind}experts, cached"] for kind in ("", "int8 "))
        bound = (weights + keys) / (weights / row["bound"] + keys)
        share = ours["ratio"] / whole[0]["ours, experts, cached"]["ratio"] if whole else None
        numbers = [
            f"{ours['ratio']:.2f}",
            _number(share, ".2f"),
            f"{weights:.1f} / {keys:.1f}",
            f"{bound:.2f}",
            f"{100 * bound / ours['ratio']:.0f} %",
        ]
        fp32_mib, int8_mib = row["mib"]["ours, experts"], row["mib"]["ours, int8 experts, cached"]
        less = (fp32_mib - int8_mib) * row["k"] / record["sizes"]["num_experts"]
        in_8_bits = [f"{int8['ratio']:.2f}", f"{ours['ratio'] / int8['ratio']:.2f}", f"{(weights + keys) / (weights + keys - less):.2f}"]
        cells.append([f"k = {row['k']}, {row['precision']}", *numbers, *in_8_bits, f"{fp32_mib} / {int8_mib}"])
    columns += ["int8: time / dense", "faster than fp32 experts", "bound", "MiB of weights, fp32 / int8"]
    return "\n".join([*_head(["generation, cached", *columns]), *map(_line, cells)])


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _tokens(sizes: dict[str, Any]) -> int:
    """Tokens of one pass."""
    lanes, positions = sizes.get("batch_size", 1), sizes.get("tokens") or sizes["tgt_len"]
    return lanes * positions


def layer_table(record: dict[str, Any]) -> str:
    """A table for each precision: a row for each implementation, a column for each k, cells time / dense; then peak memory."""
    lines = [f"{_what(record)} Time relative to the dense network of equal parameters. {_where(record)}"]
    for precision in dict.fromkeys(row["precision"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["precision"] == precision]
        lines += ["", *_head([precision, *(f"k = {row['k']}" for row in rows), "peak memory, MiB"])]
        for name in rows[0]["results"]:
            results = [row["results"][name] for row in rows]
            memory = " / ".join(f"{result['peak_mib']:.0f}" for result in results if "peak_mib" in result) or "–"
            lines.append(_line([name, *(f"{result['ratio']:.2f}" for result in results), memory]))
    return "\n".join(lines)


def growth_table(record: dict[str, Any]) -> str:
    """A table for each size that grows: rows its values, columns implementations, cells milliseconds."""
    lines = [f"{_what(record)} Milliseconds. {_where(record)}"]
    for axis in dict.fromkeys(row["axis"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["axis"] == axis]
        lines += ["", *_head([axis, *rows[0]["results"]])]
        lines += [_line([f"{row['value']:,}", *(f"{1e3 * result['seconds']:.3g}" for result in row["results"].values())]) for row in rows]
    return "\n".join(lines)


def memory_table(record: dict[str, Any]) -> str:
    """Rows precisions, columns implementations, cells MiB."""
    lines = [f"{_what(record)} Most MiB that torch had allocated at once, without parameters. {_where(record)}", ""]
    lines += _head(["precision", *record["rows"][0]["results"]])
    cells = [[row["precision"], *(f"{result['peak_mib']:,.0f}" for result in row["results"].values())] for row in record["rows"]]
    return "\n".join([*lines, *map(_line, cells)])


def mixed_table(record: dict[str, Any]) -> str:
    """Rows precisions, forward alone and with backward, columns ways to compute rows of different k, cells time over the largest k."""
    lines = [f"{_what(record)} Time relative to all rows at the largest k (least to largest of a round). {_where(record)}", ""]
    lines += _head(["", "mean k / largest", *record["rows"][0]["results"]])
    for row in record["rows"]:
        cells = [f"{result['ratio']:.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})" for result in row["results"].values()]
        work = "forward and backward" if row["training"] else "forward"
        lines.append(_line([f"{row['precision']}, {work}", f"{row['bound']:.2f}", *cells]))
    masses = " and ".join(dict.fromkeys(f"p = {row['p']:.3f} takes {row['mean_k']:.2f}" for row in record["rows"]))
    return "\n".join([*lines, "", f"Mean number of experts by gate mass: {masses}."])


def softmax_table(record: dict[str, Any]) -> str:
    """Rows the head alone and with the embedding; time and peak memory of ours and of torch's."""
    sizes = record["sizes"]
    words = f"{sizes['n_token']:,} words, cutoffs {_listed(sizes['cutoffs'])}"
    widths = f"d {sizes['d_model']}, each cluster {sizes['div_val']} times narrower than the one before"
    batch = f"batch {sizes['batch_size']} x {sizes['tgt_len']}"
    lines = [f"Adaptive softmax, forward and backward, fp32: {words}, {widths}, {batch}. {_where(record)}", ""]
    lines += _head(["", "ours, seconds", "torch, seconds", "ours / torch", "peak memory, MiB"])
    for row in record["rows"]:
        ours, theirs = row["results"]["ours"], row["results"]["torch"]
        ratio = f"{ours['ratio']:.2f} ({ours['ratio_min']:.2f} to {ours['ratio_max']:.2f})"
        memory = f"{ours['peak_mib']:,.0f} / {theirs['peak_mib']:,.0f}"
        lines.append(_line([row["work"], f"{ours['seconds']:.2f}", f"{theirs['seconds']:.2f}", ratio, memory]))
    return "\n".join(lines)


def data_table(record: dict[str, Any]) -> str:
    """Seconds of each process."""
    results = record["rows"][0]["results"]
    lines = [f"Start-up, fresh processes, median seconds. {_where(record)}", "", *_head(["", "seconds"])]
    return "\n".join([*lines, *(_line([name, f"{result['seconds']:.2f}"]) for name, result in results.items())])


def speculation_table(record: dict[str, Any]) -> str:
    """Rows runs, k and k of the drafts, columns lengths of drafts, cells what is accepted and the time relative to plain generation."""
    sizes, rows = record["sizes"], record["rows"]
    lengths = dict.fromkeys(row["draft_length"] for row in rows)
    texts = f"{sizes['prompts']} texts of {sizes['tokens']} bytes after {sizes['prompt']} of the test split"
    lines = [
        f"Greedy generation by drafts at fewer experts, batch 1, fp32: {texts}; the same bytes as without drafts. "
        f"Cells: drafted bytes accepted, and time relative to plain generation (least to largest of a round). {_where(record)}",
        "",
    ]
    lines += _head(["run", "k", "k of the drafts", "plain, bytes/s", *(f"drafts of {length}" for length in lengths)])
    for run, k, draft_k in dict.fromkeys((row["run"], row["k"], row["draft_k"]) for row in rows):
        own = [row for row in rows if (row["run"], row["k"], row["draft_k"]) == (run, k, draft_k)]
        speed = sizes["prompts"] * sizes["tokens"] / own[0]["results"]["plain"]["seconds"]
        cells = [_drafted(row) for row in own]
        lines.append(_line([run, str(k), str(draft_k), f"{speed:,.0f}", *cells]))
    faster = sum(row["results"]["drafts"]["ratio_max"] < 1 for row in rows)
    lines += ["", f"Drafts pay, in every round, in {faster} of {len(rows)} cells."]
    return "\n".join(lines)


def _drafted(row: dict[str, Any]) -> str:
    result = row["results"]["drafts"]
    return f"{row['accepted'] / row['drafted']:.0%}, {result['ratio']:.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})"


def _what(record: dict[str, Any]) -> str:
    """The measured work and its sizes, in one sentence."""
    sizes, kind = record["sizes"], record["benchmark"]
    dropout = f", dropout {sizes['dropout']:g}" if sizes.get("dropout") else ""
    if kind == "layer":
        experts = f"{sizes['num_experts']} experts {sizes['d_model']} -> {sizes['d_expert']} -> {sizes['d_model']}"
        return f"One expert layer, forward and backward: {experts}, {sizes['tokens']:,} tokens{dropout}."
    if kind == "mixed":
        experts = f"{sizes['num_experts']} experts {sizes['d_model']} -> {sizes['d_expert']} -> {sizes['d_model']}"
        return f"One expert layer, {experts}, on {sizes['rows']} rows of {sizes['tgt_len']} whose k are {_listed(sizes['k'])} in turn."
    if kind == "growth":
        fixed = f"{sizes['fixed_experts']} experts and {sizes['fixed_tokens']:,} tokens unless they grow"
        wide = f"experts {sizes['width']:,} wide together, or {sizes['narrow']} each while tokens grow"
        return f"Forward and backward in {sizes['precision']} while one size grows, k = E/2: {fixed}; {wide}."
    batch = f"{sizes['batch_size']} x {sizes['tgt_len']}"
    heads = f"{sizes['n_head']} heads of {sizes['d_head']}, d {sizes['d_model']}"
    if kind == "attention":
        return f"Attention, forward and backward: {heads}, batch {batch}, memory {sizes['mem_len']:,}."
    model = f"{sizes['n_layer']} layers, d {sizes['d_model']}, {sizes['num_experts']} experts of {sizes['d_expert']}{dropout}"
    if kind == "generation":
        return f"Generation, {sizes['tokens']} bytes a round, {sizes['batch_size']} at a time: {model}, memory {sizes['tgt_len']}."
    step = "Training step (forward, backward, clipping, Adam)"
    name = {"step": step, "memory": f"{step}, k = {sizes.get('k')}", "evaluation": "Evaluation pass"}[kind]
    return f"{name}: {model}, batch {batch} with as much memory."


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _where(record: dict[str, Any]) -> str:
    env = record["environment"]
    commit, changed, _ = (env["commit"] or "unknown").partition("+")
    code = f"commit {commit[:9]}{' with changes' if changed else ''}"
    threads = "" if record["benchmark"] == "data" else f", {env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    machine = f"{env['device_name']} ({env['cores']} cores{threads})"
    tuned = f" Tuned: {'; '.join(env['tuned'])}." if env.get("tuned") else ""
    statistic = "Measured" if record["benchmark"] == "memory" else f"Median of {record['sizes']['rounds']} interleaved rounds"
    return f"{statistic} on {machine}, torch {env['torch']}, {code}.{tuned}"


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---", *["--:"] * (len(cells) - 1)])]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render(records: Path = RECORDS) -> str:
    """The summary of all committed records, the figures, all implementations of the layer, memory and start-up. UserError if there is no
    record.
    """
    paths = [records / f"{name}.json" for name in (*LINES, "growth", "memory", "mixed", "softmax", "data", "speculation")]
    found = [documents.read(path, Benchmark, "restore it from version control, or measure again") for path in paths if path.exists()]
    if not found:
        raise UserError(f"{records} holds no benchmark record: run `python -m benchmarks` first")
    figures = [f"![{title}]({name})" for name, title in FIGURES.values() if (records / name).exists()]
    own = ("layer", "memory", "mixed", "softmax", "data", "speculation")
    details = [markdown(record) for record in found if record["benchmark"] in own]
    details += [generation_table(record) for record in found if record["benchmark"] == "generation"]
    return "\n\n".join([summary(found), *figures, *details])


if __name__ == "__main__":
    run_main(lambda: update_page(PAGE, "benchmarks", render()))
