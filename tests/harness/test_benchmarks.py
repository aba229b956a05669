"""Benchmarks: peers compute what we compute, and the commands write their records. Nothing here asserts a time."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import smoe_dropout
from benchmarks import attention, data, evaluation, figures, generation, growth, layer, memory, mixed, model, softmax, step
from benchmarks.__main__ import main, run
from benchmarks.measure import Common, interleave, peak_mib, summarise
from benchmarks.peers import EXPERT_PEERS, dense_ffn, official_style, rel_shift, scattermoe, with_peer
from benchmarks.tables import FIGURES, LINES, markdown, render, summary
from mem_transformer import MemTransformerLM, TransformerXLConfig, by_key
from smoe_dropout import MoELayer, SMoEConfig, moefy
from smoe_dropout.experts import Experts, choice

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL_LAYER = {"tokens": 24, "num_experts": 4, "d_model": 16, "d_expert": 8}
SMALL_MODEL = {"num_experts": 4, "d_model": 16, "d_expert": 8, "n_layer": 2, "n_head": 2, "d_head": 8, "tgt_len": 6}
SMALL_GROWTH = {"tgt_len": 6, "d_model": 16, "width": 32, "fixed_experts": 4, "fixed_tokens": 24}
SMALL = [
    layer.LayerFlags(k=(1, 4), **SMALL_LAYER),
    attention.AttentionFlags(batch_size=2, tgt_len=6, mem_len=4, n_head=2, d_head=8, d_model=16),
    step.StepFlags(threads=1, k=2, batch_size=2, **SMALL_MODEL),
    evaluation.EvaluationFlags(precision=("fp32",), k=(1, 4), batch_size=2, **SMALL_MODEL),
    generation.GenerationFlags(k=(1, 4), tokens=3, **SMALL_MODEL),
    memory.MemoryFlags(threads=1, k=2, batch_size=2, **SMALL_MODEL),
    growth.GrowthFlags(num_experts=(2, 4), d_expert=(8, 16), tokens=(1, 9), mem_len=(4, 8), **SMALL_GROWTH),
    mixed.MixedFlags(k=(1, 4, 1), rows=4, tgt_len=5, num_experts=4, d_model=16, d_expert=8),
    softmax.SoftmaxFlags(n_token=40, d_model=16, cutoffs=(5, 10, 30), div_val=2, batch_size=2, tgt_len=6),
]
NAMES = [*LINES, "memory", "growth", "mixed", "softmax"]


def moe_layer(k: int, d_model: int = 16, num_experts: int = 4) -> MoELayer:
    torch.manual_seed(3)
    experts = Experts(num_experts, d_model, 8, "relu", 0.0, "reference", 0.5)
    for bias in (experts.bias_up, experts.bias_down):
        torch.nn.init.normal_(bias)
    return MoELayer(d_model, experts, SMoEConfig(num_experts=num_experts, top_k=k, init_std=0.5, router="learned", balance_loss=0.0))


def assert_all_close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def without_biases(ours: MoELayer) -> MoELayer:
    for bias in (ours.experts.bias_up, ours.experts.bias_down):
        torch.nn.init.zeros_(bias.requires_grad_(False))
    return ours


@pytest.mark.parametrize("name", EXPERT_PEERS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("tokens", [2, 40])  # with 2, some experts have no token
def test_expert_peers_equal_ours(name, k, tokens):
    """Outputs and gradients; a peer without biases equals ours where they are 0."""
    ours = moe_layer(k)
    if sentence := EXPERT_PEERS[name].refusal(ours.experts.weights(torch.float32), "cpu"):
        pytest.skip(sentence)
    x, grad = torch.randn(tokens, 16, requires_grad=True), torch.randn(tokens, 16)
    found = layer.forward_backward(with_peer(ours, name), x, grad, "fp32")
    ours = ours if EXPERT_PEERS[name].biases else without_biases(ours)
    assert_all_close(found, layer.forward_backward(ours, x, grad, "fp32"))


def test_scattermoe_is_called_as_it_documents(monkeypatch):
    """With its two functions written out in plain torch, after their documentation."""

    def flatten_sort_count(indices, num_experts):
        return *indices.flatten().sort(), indices.flatten().bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(x, weights, k, expert, order, offsets, expert_biases, gates=None, grouped_in=False, grouped_out=False):
        rows = x if grouped_in else x[order // k]
        y = (rows[:, None] @ weights[expert])[:, 0] + expert_biases[expert]
        y = y if grouped_out else torch.empty_like(y).index_copy(0, order, y)
        return y if gates is None else (y.view(*gates.shape, -1) * gates[..., None]).sum(1)

    package = ModuleType("scattermoe")
    package.parallel_experts = SimpleNamespace(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    monkeypatch.setitem(sys.modules, "scattermoe", package)
    monkeypatch.setitem(sys.modules, "scattermoe.parallel_experts", package.parallel_experts)
    ours = moe_layer(3)
    x_ND = torch.randn(40, 16)
    routing = ours.route(x_ND)
    found = scattermoe(x_ND, routing.indices_NK, routing.weights_NK, ours.experts.weights(torch.float32))
    torch.testing.assert_close(found, ours(x_ND), **CLOSE)


def test_peers_that_cannot_compute_the_layer_are_left_out():
    """CUDA peers are left out on a CPU, and peers without dropout if dropout is used."""
    ours = moe_layer(2)
    everywhere = {layer.BASELINE, "ours: sorted", "ours: masked", "ours: grouped", "ours: auto", "fastmoe's way", "boolean masks"}
    without_dropout = {layer.DROPPING, *(name for name in EXPERT_PEERS if name.startswith("transformers"))}
    assert {*layer.able(ours, "fp32", "cpu")} - without_dropout == everywhere
    ours.experts.dropout = 0.5
    assert {*layer.able(ours, "fp32", "cpu")} == everywhere


def test_dense_network_is_the_sum_of_all_experts():
    experts = moe_layer(4).experts
    x = torch.randn(10, 16)
    everywhere = torch.arange(4).expand(10, 4)
    torch.testing.assert_close(dense_ffn(experts)(x), experts(x, everywhere, torch.ones(10, 4)), **CLOSE)


@pytest.mark.parametrize("T, K", [(1, 1), (1, 4), (3, 3), (3, 8)])
def test_rel_shift_is_our_shift_where_nothing_is_masked(T, K):
    term = torch.randn(2, T, K)
    mask = torch.zeros(T, K).masked_fill(torch.ones(T, K, dtype=torch.bool).triu(1 + K - T), float("-inf"))
    theirs = rel_shift(term.permute(1, 2, 0)[..., None])[..., 0].permute(2, 0, 1)
    ours = by_key(torch.nn.functional.pad(term, (0, 1)), 1)[:, 0]
    torch.testing.assert_close(theirs + mask, ours + mask, rtol=0, atol=0)


def language_models(**settings) -> list[MemTransformerLM]:
    """Ours, and the same model computed the official way; weights large enough that every term of the attention counts."""
    torch.manual_seed(5)
    config = TransformerXLConfig(31, 2, 2, 16, 8, 32, dropout=0.0, mem_len=7, init_std=0.3, **settings)
    ours = moefy(MemTransformerLM(config), SMoEConfig(num_experts=4, top_k=2, init_std=0.3))
    return [ours, official_style(ours)]


def losses_and_gradients(model: MemTransformerLM) -> dict[str, torch.Tensor]:
    """Losses of two segments, the second with the memory of the first; gradients by the names of our parameters."""
    tokens = torch.randint(31, (3, 11), generator=torch.Generator().manual_seed(6))
    first, memory, _ = model(tokens[:, :5], tokens[:, 1:6])
    second, memory, _ = model(tokens[:, 5:10], tokens[:, 6:11], memory)
    (first.mean() + second.mean()).backward()
    gradients = {name.replace("experts.experts.", "experts."): parameter.grad for name, parameter in model.named_parameters()}
    return {"first": first, "second": second, "memory": torch.stack(memory), **gradients}


@pytest.mark.parametrize("settings", [{}, {"same_length": True}, {"pre_lnorm": True}], ids=str)
def test_official_style_model_equals_ours(settings):
    expected, found = map(losses_and_gradients, language_models(**settings))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:  # a frozen router
            assert "router" in name and found[name] is None
        else:
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def test_official_style_shares_no_parameter_with_ours():
    ours, theirs = language_models()
    assert not {id(parameter) for parameter in ours.parameters()} & {id(parameter) for parameter in theirs.parameters()}


def test_training_steps_of_both_models_agree():
    flags = replace(SMALL[2], n_layer=1)
    models = model.contestants(flags, flags.k)
    before = [parameter.detach().clone() for parameter in models[model.OURS].parameters()]
    steps = [step.training_step(models[name], flags, "fp32") for name in (model.OURS, model.OFFICIAL)]
    losses = [[take() for _ in range(5)] for take in steps]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert not any(torch.equal(now, then) for now, then in zip(models[model.OURS].parameters(), before, strict=True) if now.requires_grad)


def test_evaluation_passes_of_both_models_agree():
    flags = SMALL[3]
    models = model.contestants(flags, 2)
    names = (model.OURS, model.OFFICIAL)
    passes = [evaluation.evaluation_pass(models[name], flags, "fp32", name) for name in names]
    assert passes[0]() == pytest.approx(passes[1](), abs=1e-5)


def test_the_two_attentions_agree():
    flags = SMALL[1]
    modules, given = attention.contestants(flags), attention.inputs(flags)
    found = [attention.forward_backward(module, given, torch.ones_like(given[0]), "fp32") for module in modules.values()]
    assert len(found[0]) == 1 + 2 + 3  # the output; x, biases; three matrices
    assert_all_close(*found)


def test_generation_with_and_without_a_cache_gives_the_same_bytes():
    flags = replace(SMALL[4], tokens=20)  # several times the memory
    ours = model.contestants(flags, 2)[model.OURS]
    ours.head.weight = torch.nn.Parameter(torch.randn(256, 16))  # tied, it would say the same byte for ever
    found = [generation.generator(ours, flags, "fp32", way)() for way in (generation.CACHED, generation.UNCACHED)]
    assert found[0].shape == (1, 20) and len(found[0].unique()) > 1
    torch.testing.assert_close(*found)


def test_rows_at_their_k_equal_a_pass_for_each_k_and_a_gate_mass_takes_the_mean():
    """In outputs and gradients; every row of a batch of 4 with k = 1, 4, 1, 1."""
    flags = SMALL[-2]
    ours = layer.moe_layer(layer.LayerFlags(**SMALL_LAYER), 4)
    torch.nn.init.normal_(ours.router.weight)
    x_BTD = torch.randn(400, 5, 16)
    p, taken = mixed.mass_of(ours, x_BTD, 2)
    assert taken == pytest.approx(2, abs=0.01) and 0 < p < 1
    ways = mixed.contestants(flags, ours, p)
    x_BTD = x_BTD[:4].requires_grad_()
    names = (mixed.MIXED, mixed.SEPARATE)
    found = [layer.forward_backward(mixed.Way(ours, ways[name]), x_BTD, torch.ones_like(x_BTD), "fp32") for name in names]
    assert_all_close(*found)
    largest, mean = (ways[name](x_BTD) for name in (mixed.BASELINE, mixed.MEAN))
    torch.testing.assert_close(found[0][0][1], largest[1], **CLOSE)
    assert not torch.allclose(largest, mean) and not torch.allclose(found[0][0], largest)


def test_contestants_take_turns_and_the_warm_up_round_is_dropped():
    order: list[str] = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert [sorted(order[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_within_rounds():
    found = summarise({"base": [1.0, 10.0, 2.0], "other": [2.0, 10.0, 1.0]}, "base")
    assert found["other"] == {"seconds": 2.0, "ratio": 1.0, "ratio_min": 0.5, "ratio_max": 2.0}
    assert found["base"]["ratio"] == found["base"]["ratio_min"] == found["base"]["ratio_max"] == 1.0


def test_peak_memory_is_the_most_held_at_once():
    """Memory freed during the call counts while it is held; memory held before, such as the result of an earlier pass, does not."""
    x = torch.ones(2**18)  # 1 MiB
    assert peak_mib(lambda: x * 2) == 1
    assert peak_mib(lambda: (x * 2 + 1) * 3) == 2
    assert peak_mib(lambda: [x * 2, x * 3, x * 4]) == 3
    assert peak_mib(lambda: x.add_(1)) == 0


def commands(flags: Common, out: Path) -> Common:
    return replace(flags, rounds=2, out=out)


@pytest.mark.parametrize("flags", SMALL, ids=NAMES)
def test_command_writes_a_record_and_prints_its_table(flags, tmp_path, capsys):
    run([commands(flags, tmp_path)])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["benchmark"] == path.stem in NAMES and record["schema"] == 1
    assert {"commit", "torch", "device_name", "threads", "cores"} <= record["environment"].keys()
    timed = {"seconds", "ratio", "ratio_min", "ratio_max"} if path.stem != "memory" else set()
    for row in record["rows"]:
        assert not timed or row["results"][record["baseline"] or row["baseline"]]["ratio"] == 1
        for result in row["results"].values():
            assert result.keys() == {*timed, "peak_mib"}
            assert result["peak_mib"] >= 0
    assert capsys.readouterr().out == markdown(record) + "\n"
    assert {picture.name for picture in tmp_path.glob("*.png")} == {name for kind, (name, _) in FIGURES.items() if kind == path.stem}


def test_flags_of_a_command_reach_its_record(tmp_path):
    sizes = ["--tokens", "5", "--k", "2", "--num_experts", "3", "--d_model", "8", "--d_expert", "4", "--precision", "fp32"]
    main(["layer", *sizes, "--rounds", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "layer.json").read_text())
    assert record["sizes"].items() >= {"tokens": 5, "k": [2], "num_experts": 3, "d_expert": 4, "rounds": 1}.items()
    assert [(row["k"], row["precision"], row["bound"]) for row in record["rows"]] == [(2, "fp32", 2 / 3)]


@pytest.mark.parametrize("argv", [[], ["--tuned", "--rounds", "3"]], ids=str)
def test_without_a_name_all_are_run_at_their_defaults(argv, monkeypatch):
    given = []
    monkeypatch.setattr("benchmarks.__main__.run", given.extend)
    main(argv)
    assert [type(flags).__name__.removesuffix("Flags").lower() for flags in given] == [*NAMES, "data"]
    assert all(flags.tuned is bool(argv) for flags in given)
    assert [flags.rounds for flags in given] == ([3] * 10 if argv else [type(flags)().rounds for flags in given])


def test_of_several_benchmarks_there_is_one_table(tmp_path, capsys, monkeypatch):
    """A line for each precision and k, as on the page, and with --tuned the changes it made."""
    monkeypatch.setattr(smoe_dropout, "tune_cpu", lambda: ["said by tune_cpu"], raising=False)
    run([replace(commands(flags, tmp_path), rounds=1, tuned=True) for flags in SMALL])
    table = capsys.readouterr().out.strip()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    titles = [f"| expert layer, k = {k}" for _ in range(2) for k in (1, 4)] + ["| attention"] * 2 + ["| training step, k = 2"] * 3
    titles += [f"| {name}, k = {k}" for name in ("evaluation pass", "generation, cached") for k in (1, 4)]
    assert [row[0] for row in rows] == titles
    assert table.count("Tuned: said by tune_cpu.") == len(LINES)
    assert render(tmp_path).startswith(table)
    assert all(f"]({name})" in render(tmp_path) for name, _ in FIGURES.values())


def test_backends_writes_the_table_that_auto_chooses_by(tmp_path, capsys, monkeypatch):
    """It stores the fraction of experts up to which using `sorted` minimises the total time; other sizes use the nearest row."""
    seconds = {"masked": [2.0], "1": [2.2], "2": [1.0], "4": [3.0]}
    monkeypatch.setattr(
        "benchmarks.backends.interleave", lambda calls, rounds: {name: seconds[name] for name, call in calls.items() if [call()]}
    )
    out = tmp_path / "backend_table.json"
    sizes = ["--sizes", "16", "8", "4", "900", "64", "32"]
    main(["backends", "--out", str(out), "--precision", "fp32", "--num_experts", "4", "--k", "1", "2", "4", *sizes])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tokens"], row["training"], row["sorted_up_to"]) for row in rows] == [
        (tokens, training, 0.5) for training in (True, False) for tokens in (16, 900)
    ]
    assert "fp32, 900 tokens, 64 -> 32, training: sorted up to k/E = 0.5" in capsys.readouterr().out
    rows[1]["sorted_up_to"] = 1.0
    out.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(choice, "TABLE", out)
    for cached in (choice._table, choice.sorted_up_to):
        cached.cache_clear()
    try:
        chosen = [choice.choose_backend(tokens, 4, 4, 3 * width, 7 * width, torch.float32, "cpu") for tokens, width in ((10, 1), (1000, 8))]
    finally:
        for cached in (choice._table, choice.sorted_up_to):
            cached.cache_clear()
    assert chosen == ["masked", "sorted"]


def test_data_contestants_are_fresh_processes_that_do_their_work(tmp_path):
    source, out = tmp_path / "text", tmp_path / "prepared"
    data.write_text(source, 12_345)
    assert source.stat().st_size == 12_345
    found = data.contestants(source, out, 0.012345)
    for name in (data.BASELINE, "train.py refuses a wrong flag", "data/prepare.py, 0.012345 MB"):
        found[name]()
    assert json.loads((out / "meta.json").read_text())["text"]["bytes"] == 12_345
    with pytest.raises(RuntimeError, match="exited with 3, not 0"):
        data.process("-c", "raise SystemExit(3)")()


def test_data_command_writes_a_record_and_prints_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "interleave", lambda calls, rounds: {name: [2.0] * rounds for name in calls})
    main(["data", "--megabytes", "0.01", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["rows"][0]["results"]["data/prepare.py, 0.01 MB"]["seconds"] == 2
    assert capsys.readouterr().out == markdown(record) + "\n"


def layer_record(ratio: float, **others: float) -> dict:
    """A record of the layer with E = 4 experts at k = 1 and 2."""

    def results() -> dict:
        ratios = {"dense": 1.0, "ours: auto": ratio, "ours: masked": 1.0, "fastmoe's way": 2 * ratio, **others}
        same = {name: dict.fromkeys(("ratio", "ratio_min", "ratio_max"), value) for name, value in ratios.items()}
        return {name: {"seconds": value["ratio"] / 10, "peak_mib": 8.0, **value} for name, value in same.items()}

    rows = [{"precision": "fp32", "k": k, "bound": k / 4, "results": results()} for k in (1, 2)]
    where = {"commit": "c" * 40, "device_name": "a CPU", "cores": 2, "threads": 1, "torch": "2", "tuned": []}
    sizes = {"num_experts": 4, "d_model": 8, "d_expert": 16, "tokens": 100, "dropout": 0.0, "rounds": 1}
    return {"benchmark": "layer", "baseline": "dense", "sizes": sizes, "rows": rows, "environment": where}


def test_numbers_of_the_one_table():
    """A bound of 1/4 against a time of 0.4; the peer twice as slow; 100 tokens in 0.04 s."""
    line = next(line for line in summary([layer_record(0.4)]).splitlines() if "k = 1 |" in line)
    assert line == "| expert layer, k = 1 | fp32 | 0.40 | 0.25 | 62 % | 2.00 (fastmoe's way) | 2,500 | 8.0 / 8.0 |"


def test_a_record_without_bound_and_peak_memory_is_readable():
    """Records of earlier versions have neither."""
    record = layer_record(0.4)
    for row in record["rows"]:
        del row["bound"]
        for result in row["results"].values():
            del result["peak_mib"]
    assert "| 0.40 | – | – | 2.00 (fastmoe's way) | 2,500 | – / – |" in summary([record])
    assert "| ours: auto | 0.40 | 0.40 | – |" in markdown(record)


def test_figure_of_time_by_k_draws_ours_the_peers_and_the_bound():
    (panel,) = figures.time_by_k(layer_record(0.4, other=0.7)).axes
    containers = {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in panel.containers}
    assert containers == {"ours: auto": [0.4, 0.4], "fastmoe's way": [0.8, 0.8], "other": [0.7, 0.7]}
    bound = next(line for line in panel.lines if line.get_label() == "bound k/E")
    assert list(zip(*bound.get_data(), strict=True)) == [(0, 0), (2, 0.5)]


def test_figure_of_growth_has_a_panel_for_each_size_in_milliseconds():
    times = {"tokens": {"dense": 0.5, "ours: auto": 0.25}, "mem_len": {"official style": 2.0, "ours": 1.0}}
    rows = [
        {"axis": axis, "value": value, "results": {name: {"seconds": value * time} for name, time in ways.items()}}
        for axis, ways in times.items()
        for value in (1, 2)
    ]
    panels = figures.growth({"rows": rows}).axes
    drawn = [{line.get_label(): line.get_ydata().tolist() for line in panel.lines} for panel in panels]
    assert drawn == [{name.removesuffix(": auto"): [1e3 * time, 2e3 * time] for name, time in ways.items()} for ways in times.values()]
