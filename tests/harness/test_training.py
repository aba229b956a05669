"""Tiny runs of every registered method: records, trained parameters, and parameters left unchanged."""

import math
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smoe_dropout.methods.base import Method
from smoe_dropout.options import option_names
from smoe_dropout.registry import METHODS, load
from smoe_dropout.schedule import TopKSchedule
from tests import tiny
from tests.harness.test_parallel import PARTS

E, STEPS = 4, 24
# what result.json has, as utils.reporting reads it
RESULT = {
    **{"schema": int, "status": str, "table": str, "method": str, "settings": dict, "sparse": bool},
    **{"preset": str, "preset_settings": dict, "dataset": dict},
    **{"metric": dict, "seed": int, "model": dict, "parameters": dict, "quality": list, "best_step": int, "training": dict},
    **{"peak_memory_mib": float, "curve": dict, "environment": dict, "argv": list, "config_sha256": str, "weights_sha256": str},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words", held_out_bytes=36)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Returns a method and the folder of a finished run of it, with a log line for every step."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def of(name: str) -> tuple[Method, Path]:
        changes = {"method": name, "log_interval": 1, "save_interval": STEPS - 1, "dropout": 0.0, "lr": 1e-2}
        done = tiny.completed(tiny.flags(corpus, root / name, **changes))
        assert "done: " in done.out and done.err == ""
        return load(METHODS, "method", name), root / name

    return of


@pytest.fixture(params=METHODS)
def run(request, finished):
    return finished(request.param)


def test_result_has_every_field(run):
    method, folder = run
    result = tiny.read_json(folder / "result.json")
    assert {name: type(value) for name, value in result.items()} == RESULT | {"routing": dict if method.sparse else type(None)}
    if method.sparse:
        assert result["routing"]["k"] == E // 2 and 0 <= result["routing"]["load_entropy"] <= 1 + 1e-9
    assert (result["schema"], result["status"], result["method"], result["sparse"]) == (2, "complete", method.name, method.sparse)
    assert result["settings"] == ({"moe_num_expert": E} if method.sparse else {})
    assert result["preset"] == "quick" and result["preset_settings"]["max_step"] == STEPS
    assert result["model"]["num_experts"] == (E if method.sparse else None) and result["model"]["d_ff"] == 64
    assert result["model"]["moe_layers"] == ([0, 1] if method.sparse else [])
    assert [row["k"] for row in result["quality"]] == ([1, 2, 4] if method.sparse else [None])
    for row in result["quality"]:
        assert 0 < row["test"] < 8 and 0 < row["valid"] < 8 and row["tokens_per_second"] > 0
    for name in ("active_parameters", "active_ffn_parameters", "flops_per_token"):
        values = [row[name] for row in result["quality"]]
        assert values == sorted(values) and values[0] > 0  # equal where tokens choose experts that do nothing
        assert len(values) == 1 or values[0] < values[-1]
    active, idle = result["quality"][-1]["active_parameters"], getattr(method.layer, "variable", None) is True  # experts that do nothing
    assert active < result["parameters"]["total"] if idle else active == result["parameters"]["total"]
    training = result["training"]
    assert training["steps"] == STEPS and training["tokens"] == STEPS * 4 * 8 and training["seconds"] > 0 and training["flops"] > 0
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["seconds"])
    assert [point[0] for point in result["curve"]["train"]] == list(range(1, STEPS + 1))
    assert [point[0] for point in result["curve"]["valid"]] == [8, 16, 24]
    environment = tiny.read_json(folder / "env.json")["starts"]
    assert len(environment) == 1 and environment[0]["argv"][1:] == result["argv"]
    assert {"commit", "torch", "device_name", "world_size"} <= result["environment"].keys() <= environment[0].keys()
    assert len(environment[0]["tuned"]) == 2  # the preset asks for it


def test_k_follows_the_schedule(run):
    method, folder = run
    config = tiny.read_json(folder / "config.json")
    modes = method.flags.get("dynamic_moe_mode", "constant")
    low, high = (
        (method.flags.get("moe_top_k_min", E // 2), E) if method.flags.get("dynamic_moe") else (method.flags.get("moe_top_k", E // 2),) * 2
    )
    schedule = TopKSchedule(modes, low, high, STEPS, config["seed"])
    for line in tiny.metrics(folder, "train"):
        step = line["step"] - 1
        assert line["k"] == (schedule(step) if method.sparse else None)
        assert line["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * step / STEPS)) / 2)
        assert line["bpc"] == pytest.approx(line["loss"] / math.log(2)) and 0 < line["grad_norm"] < 100


def test_validation_is_at_the_current_k_and_half_and_all_and_the_best_is_chosen_at_the_last(run):
    method, folder = run
    last_k = E if method.flags.get("dynamic_moe") else method.flags.get("moe_top_k", E // 2)
    train = {line["step"]: line for line in tiny.metrics(folder, "train")}
    valid = tiny.metrics(folder, "valid")
    for line in valid:
        expected = {f"bpc_k{k}" for k in (line["k"], E // 2, E)} if method.sparse else {"bpc"}  # the last k is of these
        assert line.keys() - {"step", "split", "k"} == expected and line["k"] == train[line["step"]]["k"]
    at_last = f"bpc_k{last_k}" if method.sparse else "bpc"
    result = tiny.read_json(folder / "result.json")
    best = min(valid, key=lambda line: line[at_last])
    assert best["step"] == result["best_step"]
    tested = next(row for row in result["quality"] if row["k"] == (last_k if method.sparse else None))
    assert tested["valid"] == pytest.approx(best[at_last], abs=1e-9)  # the weights tested are the best ones


@pytest.mark.parametrize(
    ("schedule", "last_k"),
    [({"dynamic_moe_mode": "linear_decrease", "moe_top_k_min": 1}, 1), ({"dynamic_overall_steps": 2 * STEPS}, 3)],
)
def test_the_best_is_of_the_k_that_training_ends_at(schedule, last_k, corpus, tmp_path):
    tiny.completed(tiny.flags(corpus, tmp_path, method="smoe_dropout", **schedule))
    found = {line["step"]: line[f"bpc_k{last_k}"] for line in tiny.metrics(tmp_path, "valid")}
    state = tiny.read_json(tiny.checkpoints(tmp_path)[-1] / "state.json")
    assert (state["best"], state["best_step"]) == min((value, step) for step, value in found.items()) and len(found) == 3


def test_loss_falls_and_routers_are_trained_only_where_they_should(run):
    method, folder = run
    losses = [line["loss"] for line in tiny.metrics(folder, "train")]
    assert losses[0] == pytest.approx(math.log(256), abs=0.5) and losses[-1] < losses[0] - 2
    states = [load_file(path / "model.safetensors") for path in tiny.checkpoints(folder)[-2:]]
    routers = [name for name in states[0] if ".router." in name]
    routed = method.sparse and method.flags["gate_name"] != "none"
    assert len(routers) == (4 if routed else 0)
    for name in states[0]:
        frozen = name in routers and method.flags["freeze_gate"]
        if name.endswith(".router.weight") or frozen:
            assert torch.equal(states[0][name], states[1][name]) == frozen, name
    if routed:
        assert ("auxiliary_loss" in tiny.metrics(folder, "train")[-1]) == (not method.flags["freeze_gate"])


def initial_weights(path: str) -> None:
    """Writes the weights that a run starts from."""
    import utils.training.optimizer as optimizer
    from smoe_dropout.io import save_model

    build = optimizer.build_optimizer

    def keep(model, flags):
        save_model(model, path)
        return build(model, flags)

    optimizer.build_optimizer = keep


def test_a_frozen_router_ends_as_it_was_drawn(corpus, tmp_path):
    tiny.completed(tiny.flags(corpus, tmp_path / "run", method="smoe_dropout"), partial(initial_weights, str(tmp_path / "start")))
    before, after = (
        load_file(tmp_path / "start" / "model.safetensors"),
        load_file(tiny.checkpoints(tmp_path / "run")[-1] / "model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {name for name in before if ".router." not in name}
    weight = before["layers.0.feed_forward.core.router.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.3) and not before["layers.0.feed_forward.core.router.bias"].any()


def test_tensorboard_has_the_scalars_and_the_expert_load(run):
    method, folder = run
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    for split in ("train", "valid"):
        lines = tiny.metrics(folder, split)
        for name in lines[0].keys() - {"step", "split"}:
            points = {line["step"]: line[name] for line in lines if line.get(name) is not None}
            found = {event.step: event.value for event in events.Scalars(f"{split}/{name}")} if points else {}
            assert found == pytest.approx(points, rel=1e-6), (split, name)
    histograms = events.Tags()["histograms"]
    assert len(histograms) == (2 if method.sparse else 0)
    for name in histograms:
        assert name.startswith("expert_load/layers.")
        shares = [event.histogram_value for event in events.Histograms(name)]
        sums = [sum(share.bucket) for share in shares]
        none = method.layer is not None and method.layer.variable is True  # then perhaps no token has an expert
        assert len(sums) == STEPS and all(total == pytest.approx(1, abs=1e-6) or (none and total == 0) for total in sums)
        if method.name == "smoe_dropout":  # at k = E all experts get the same
            assert list(shares[-1].bucket)[-E:] == pytest.approx([1 / E] * E)


@pytest.mark.parametrize("name", [name for name in ("dense", "concrete_dropout", "smoe_dropout", "thor") if name in METHODS])
def test_eval_only_gives_the_numbers_of_the_result(name, finished):
    """A model of each kind: dense, converted, with a router, without one. Weights of every method load again: test_contract.py."""
    method, folder = finished(name)
    tiny.completed(["--eval_only", *(["--k", "1,2"] if method.sparse else []), "--work_dir", str(folder)])
    evaluated, result = tiny.read_json(folder / "eval.json"), tiny.read_json(folder / "result.json")
    rows = {row["k"]: row["test"] for row in result["quality"]}
    assert evaluated["best_step"] == result["best_step"] and evaluated["data"] == result["dataset"]["fingerprint"]
    assert {row["k"]: row["test"] for row in evaluated["quality"]} == {k: rows[k] for k in ([1, 2] if method.sparse else [None])}


DRAW_FOR_EACH_PASS = {"concrete_dropout", "dropblock", "block_dropout", "thor", "matryoshka"}


@pytest.mark.parametrize("method", [method for method in METHODS if method not in DRAW_FOR_EACH_PASS and method not in PARTS])
def test_batch_chunk_gives_the_same_losses(method, corpus, tmp_path):
    """3 chunks of 5 lanes have 2, 2 and 1. No balance loss, which would be computed per chunk. PARTS are in test_parallel.py in chunks."""
    found = load(METHODS, "method", method)
    balance = {"load_balance": 0.0} if found.sparse else {}
    if "times_balance" in option_names([found.options]):  # of the router's loss, which is a mean over tokens
        balance["method_options"] = "times_balance=false"
    for chunks in (1, 3):
        changes = {"method": method, "batch_size": 5, "batch_chunk": chunks, "dropout": 0.0, "log_interval": 1, "max_step": 5} | balance
        tiny.completed(tiny.flags(corpus, tmp_path / str(chunks), **changes))
    whole, parts = (tiny.metrics(tmp_path / str(chunks)) for chunks in (1, 3))
    assert len(whole) == len(parts) == 5 + 1
    for one, other in zip(whole, parts, strict=True):
        for name, value in one.items():
            if name == "loss" or name.startswith("bpc"):
                assert other[name] == pytest.approx(value, rel=1e-6), (one["step"], name)  # float32 rounds to 1.2e-7


def record_passes(path: str) -> None:
    """Writes a line for every training pass: the position in the lane, and how much memory the model was given."""
    import mem_transformer

    forward = mem_transformer.MemTransformerLM.forward

    def recorded(self, tokens, targets, memory=None):
        if self.training:
            with open(path, "a") as file:
                file.write(f"{tokens.shape[1]} {memory[0].shape[1] if memory else 0} {self.layers[0].feed_forward.core.top_k}\n")
        return forward(self, tokens, targets, memory)

    mem_transformer.MemTransformerLM.forward = recorded


def test_memory_is_dropped_where_the_text_starts_again_and_k_is_put_back_after_validation(tmp_path):
    corpus = tiny.write_corpus(tmp_path / "short", train_bytes=4 * (5 * 8 + 4))  # 5 whole segments a lane and one of 3
    arguments = tiny.flags(corpus, tmp_path / "run", method="smoe_dropout", mem_len=20, max_step=12, eval_interval=3, yes=True)
    tiny.completed(arguments, partial(record_passes, str(tmp_path / "passes")))
    passes = [tuple(map(int, line.split())) for line in (tmp_path / "passes").read_text().splitlines()]
    schedule = TopKSchedule("linear_increase", 2, 4, 12)
    epoch = [(8, 0), (8, 8), (8, 16), (8, 20), (8, 20), (3, 20)]
    assert [(length, memory) for length, memory, _k in passes] == epoch * 2
    assert [k for *_, k in passes] == [schedule(step) for step in range(12)]


@pytest.mark.parametrize("optim", ["sgd", "adagrad"])
def test_other_optimisers_and_plateau_run(optim, corpus, tmp_path):
    """With a learning rate of nearly 0 validation never improves, so the plateau halves it every time."""
    scheduler = {"scheduler": "dev_perf", "decay_rate": 0.5, "lr_min": 1e-13, "lr": 1e-12} if optim == "sgd" else {"lr": 1e-2}
    changes = {"optim": optim, "mom": 0.9 if optim == "sgd" else None, "method": "dense", "log_interval": 1, "dropout": 0.0, **scheduler}
    tiny.completed(tiny.flags(corpus, tmp_path, **changes))
    lines = tiny.metrics(tmp_path, "train")
    if optim == "sgd":
        rates = Counter(line["lr"] for line in lines)
        factors, waiting = [1e-12], [line["bpc"] for line in tiny.metrics(tmp_path, "valid")]
        for index in (0, 1):
            factors.append(factors[-1] * (1 if waiting[index] < min(waiting[:index], default=math.inf) else 0.5))
        assert rates == Counter(factors[0:1] * 8 + factors[1:2] * 8 + factors[2:3] * 8)
    else:
        assert lines[-1]["loss"] < lines[0]["loss"] - 1


def test_a_schedule_that_ends_early_keeps_its_last_k(corpus, tmp_path):
    arguments = tiny.flags(corpus, tmp_path, method="smoe_dropout", dynamic_overall_steps=6, max_step=12, log_interval=1)
    tiny.completed(arguments)
    assert [line["k"] for line in tiny.metrics(tmp_path, "train")] == [2, 2, 3, 3, 3, 4] + [4] * 6


def test_predrawn_competition_is_timed_and_trained(corpus, tmp_path):
    """The step timed before training also gets the progress of training."""
    finished = tiny.completed(tiny.flags(corpus, tmp_path, method="competesmoe", method_options="predrawn=true,flip_rate=0.5", yes=None))
    shares = [value for name, value in tiny.metrics(tmp_path, "train")[-1].items() if name.endswith("competition_share")]
    assert "predrawn" in str(tiny.read_json(tmp_path / "result.json")["settings"]) and len(shares) == 2 and 0 < sum(shares) < 2
    assert "done" in finished.out
