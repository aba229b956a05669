"""transformers' Trainer on two processes: k follows its schedule on both, also after a restart, and final weights equal those of one.

All runs that can be together are made by one pair of processes, since importing transformers takes longer than all of them; what resumes
is made by another pair. One process is given the batches of both.
"""

import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

import smoe_dropout as sd
from smoe_dropout.registry import BACKENDS
from tests import tiny
from tests.harness.test_parallel import as_rank, free_port
from tests.library.test_hosts import made
from tests.library.test_transformers_trainer import ks, losses, rows, trainer, undropped

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BATCH, ACCUMULATED = 4, 2  # samples over all processes, and micro-batches per step
COLLECTIVE, ALL = 60, 240  # seconds until a process waiting for the other fails, and until both are killed
FROZEN, UNIFORM = {"router": "random", "balance_loss": None}, {"gate_weight": "uniform"}  # only the balance loss then moves a router
# Equal label counts for BERT, whose loss is a mean: otherwise the mean of two processes' means would not be the overall mean
AS_ONE = {
    "bert, frozen": {"schedule": ("linear_increase", 1, 4), "experts": FROZEN},
    "bert, balanced": {"schedule": ("elastic", 1, 3), "experts": UNIFORM},
    "llama, frozen": {"host": "llama", "schedule": ("cosine_decrease", 1, 4), "experts": FROZEN, "even": False},
    "llama, balanced": {"host": "llama", "schedule": ("linear_increase", 1, 3)},
}
# Two tokens per process and pass, so that at k = 1 at least two of four experts have none
FEW = {"schedule": ("constant", 1, 1), "positions": 2, "batch": 2, "arguments": {"ddp_find_unused_parameters": False}}
WITHOUT_TOKENS = {
    **{f"{name}, without tokens": {**FEW, "experts": {**FROZEN, "backend": name}} for name in BACKENDS if name not in ("fastmoe", "fused")},
    "balanced, without tokens": {**FEW, "experts": UNIFORM},
    "as the Trainer sets DDP, without tokens": {**FEW, "experts": FROZEN, "arguments": {}},
}
# With BERT's own dropout, and 10 samples, so that an epoch ends with half a step; 6 steps, and a checkpoint in mid-epoch
SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random", "optim": "adamw_torch"}
SAVED |= {"lr_scheduler_type": "linear", "learning_rate": 0.01}
RESUMED = {
    "frozen": {"schedule": ("linear_increase", 1, 4), "experts": FROZEN, "dropout": True, "samples": 10, "arguments": SAVED},
    "balanced": {"schedule": ("elastic", 1, 4), "dropout": True, "samples": 10, "arguments": SAVED},
}
COMPETING = {"competesmoe": {"schedule": ("linear_increase", 1, 3), "experts": {"method": "competesmoe", "options": {"flip_rate": 0.5}}}}
TOGETHER = AS_ONE | RESUMED | WITHOUT_TOKENS
CASES = TOGETHER | COMPETING


def build(name: str, rank: int = 0) -> torch.nn.Module:
    """Build a model whose LayerNorms have unit gains, so that tokens differ at the experts and gradients can be compared.

    Each process has its own seed and weights, as without `manual_seed`; data parallelism uses those of the first.
    """
    case = CASES[name]
    host = made("bert") if case.get("dropout") else undropped(case.get("host", "bert"))
    for key, parameter in host.named_parameters():
        if "norm" in key.lower():
            torch.nn.init.constant_(parameter, float(key.endswith("weight")))
    balanced = {"router": "learned", "balance_loss": 0.1}
    torch.manual_seed(rank)
    model = sd.moefy(host, sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, "init_std": 0.2, **balanced, **case.get("experts", {})}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * rank)
    return model


def train(name: str, folder: Path, rank: int = 0, processes: int = 1, checkpoint: Path | None = None) -> dict:
    """Run training and record k, step and expert loads of every pass, the router's local gradients, losses and weights."""
    case, model, record = CASES[name], build(name, rank), {"k": [], "loads": [], "gradients": []}
    data = [{key: row[key][: case.get("positions")] for key in row} for row in rows(case.get("samples", 8), case.get("even", True))]
    layer = sd.moe_layers(model)[0][1]
    model.register_forward_pre_hook(lambda *_: record["k"].append((sd.get_top_k(model), layer.step)))
    model.register_forward_hook(lambda *_: record["loads"].append(torch.stack(list(sd.expert_load(model).values()))))
    if layer.router.weight.requires_grad:  # before gradients are averaged over processes
        layer.router.weight.register_hook(lambda gradient: record["gradients"].append(gradient.clone()))
    arguments = {"max_steps": 4, **case.get("arguments", {})}
    batches = {"per_device_train_batch_size": case.get("batch", BATCH) // processes, "gradient_accumulation_steps": ACCUMULATED}
    run = trainer(model, folder, data, [sd.TopKScheduleCallback(*case["schedule"], seed=5)], **batches, **arguments)
    assert run.args.world_size == processes
    run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return {**record, "losses": losses(run), "logged": ks(run), "weights": weights}


def work(rank: int, port: int, folder: Path, names: list[str], before: Path | None) -> None:
    """Body of one of two processes; its last line of output names the current run."""
    as_rank(rank, 2, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE))  # the Trainer's ddp_timeout has no effect on CPUs
    for name in names:
        print(name, flush=True)
        record = train(name, folder / name, rank, 2, before and before / name / "checkpoint-3")
        torch.save(record, folder / name / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    sys.exit()


class Pair:
    """Two training processes and their records."""

    def __init__(self, folder: Path, names: list[str], before: Path | None = None):
        self.folder, port = folder, free_port()
        for name in names:
            (folder / name).mkdir(parents=True)
        runs = [tiny.Running([], partial(work, rank, port, folder, names, before)) for rank in range(2)]
        self.ended = "both ended"
        try:
            runs[0].wait_until(lambda: not runs[1].process.is_alive(), ALL)
            for run in runs:
                run.process.join(30)
        except AssertionError as hang:
            self.ended = str(hang)
        finally:
            for run in runs:
                run.send(signal.SIGKILL)
                finished = run.finish()
                self.ended += f"\nexit code {finished.code}, at {finished.out[-200:]!r}\n{finished.err[-3000:]}"

    def __call__(self, name: str) -> list[dict]:
        """Records of a run, of both processes."""
        paths = [self.folder / name / f"{rank}.pt" for rank in range(2)]
        assert all(path.exists() for path in paths), self.ended
        return [torch.load(path) for path in paths]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"), list(TOGETHER))


@pytest.fixture(scope="module")
def restarted(pair, tmp_path_factory):
    """A pair resumed from the checkpoints of the first."""
    return Pair(tmp_path_factory.mktemp("restarted"), list(RESUMED), pair.folder)


def assert_follows(record: dict, name: str, passes: list[int]) -> None:
    """Assert k of each pass, given the passes' steps, and of each log entry."""
    steps = max(passes) + 1
    schedule = sd.TopKSchedule(*CASES[name]["schedule"], steps, seed=5)
    assert record["k"] == [(schedule(step), step) for step in passes]
    assert record["logged"] == [schedule(step) for step in range(steps)]


def assert_same_weights(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def moved(weights: dict, name: str) -> dict[str, float]:
    """Distance that each weight moved; asserts that all experts moved, and routers unless frozen."""
    far = {key: (weights[key] - value).abs().max().item() for key, value in build(name).state_dict().items()}
    frozen = CASES[name].get("experts", {}).get("router") == "random"
    for key, distance in far.items():
        if "router" in key and frozen:
            assert distance == 0.0, key
        elif "router" in key or "experts" in key:
            assert distance > 1e-4, key
    return far


def assert_as_one(both: list[dict], alone: dict, name: str) -> None:
    """Assert equality up to the order of float32 sums."""
    assert_same_weights(both[0]["weights"], both[1]["weights"])
    for key, distance in moved(alone["weights"], name).items():
        torch.testing.assert_close(both[0]["weights"][key], alone["weights"][key], rtol=0.0, atol=0.01 * distance + 1e-6, msg=key)
    assert moved(both[0]["weights"], name).keys() == alone["weights"].keys()
    assert both[0]["losses"] == both[1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_equal_one_with_both_batches(name, pair, tmp_path):
    """Including the balance loss, whose assignments are counted over both processes."""
    both, alone = pair(name), train(name, tmp_path)
    for record in (*both, alone):
        assert_follows(record, name, [step for step in range(4) for _ in range(ACCUMULATED)])
    assert_as_one(both, alone, name)


def test_balance_loss_reaches_the_router_on_both_processes(pair, tmp_path):
    """Each process contributes its part in each pass, and the mean is the gradient of both batches."""
    (first, second), alone = (record["gradients"] for record in pair("bert, balanced")), train("bert, balanced", tmp_path)["gradients"]
    assert len(first) == len(second) == len(alone) == 4 * ACCUMULATED
    for ours, theirs, whole in zip(first, second, alone, strict=True):
        assert min(ours.abs().max(), theirs.abs().max()) > 1e-4 and not torch.allclose(ours, theirs, rtol=0.1)
        torch.testing.assert_close((ours + theirs) / 2, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_TOKENS)
def test_experts_without_tokens_on_one_process_do_not_stall(name, pair, tmp_path):
    both = pair(name)
    used, others = (torch.stack(record["loads"]) > 0 for record in both)  # [passes, layers, experts]
    averaged = slice(ACCUMULATED - 1, None, ACCUMULATED)  # passes after which DDP synchronises gradients
    assert len(used) == 4 * ACCUMULATED and (used & ~others)[averaged].any() and (others & ~used)[averaged].any()
    assert_as_one(both, train(name, tmp_path), name)


def test_processes_compete_in_the_same_steps_with_different_seeds(tmp_path):
    """Otherwise one would wait for the counts of a balance loss that the other does not compute."""
    both, alone = Pair(tmp_path / "two", list(COMPETING))("competesmoe"), train("competesmoe", tmp_path / "one")
    assert_as_one(both, alone, "competesmoe")
    assert any(0 < value < 4 * ACCUMULATED for key, value in alone["weights"].items() if key.endswith("competitions"))


@pytest.mark.parametrize("name", RESUMED)
def test_run_resumed_by_new_processes_equals_the_uninterrupted_one(name, pair, restarted):
    """k, losses and weights are equal on both."""
    whole, again = pair(name), restarted(name)
    passes = [0, 0, 1, 2, 2, 3, 4, 4, 5]  # the last batch of an epoch is a separate step
    for record in whole:
        assert_follows(record, name, passes)
    for ours, theirs in zip(whole, again, strict=True):
        assert theirs["k"] == ours["k"][5:] and len(theirs["losses"]) == 6
        assert theirs["losses"] == ours["losses"] and theirs["logged"] == ours["logged"]
        assert_same_weights(ours["weights"], theirs["weights"])
    assert_same_weights(whole[0]["weights"], whole[1]["weights"])
    moved(whole[0]["weights"], name)
    saved = sd.from_pretrained(pair.folder / name / "checkpoint-6")
    assert sd.get_top_k(saved) == whole[0]["k"][-1][0]
    assert_same_weights(saved.state_dict(), whole[0]["weights"])
