"""Quality of trained models against measured time and FLOPs: uniform k, k planned by layer, thresholds, and a dense model.

    python -m benchmarks tradeoff RUN... --dense DENSE_RUN... [--data TEXT]

k is planned on the beginning of the validation split; quality and time are measured on the test split, which no plan has seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

import smoe_dropout as sd
from benchmarks.measure import SCHEMA, Common, Device, interleave, summarise
from benchmarks.tradeoff_table import DENSE, FLOPS, MASS, RECORDS, TIME, UNIFORM
from smoe_dropout.options import ConfigError
from smoe_dropout.routers import LinearRouter
from utils import documents
from utils.checkpoints.origin import open_run
from utils.cli.surgery import open_text
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import Flags, names
from utils.models.flops import forward_flops
from utils.reporting.records import read_record
from utils.tasks.base import Task
from utils.training.run_folder import describe_environment
from utils.training.setup import pretraining_run

Pass = tuple[Callable[[], float], Tensor]  # runs the model once and returns its mean loss; a mask of as many positions as have a loss
KEPT = ("table", "method", "settings", "sparse", "preset", "preset_settings", "dataset", "seed", "model", "metric")  # of a run's record


@dataclass(frozen=True)
class TradeoffFlags(Common):
    """Quality of finished runs with experts against time and FLOPs, by the ways to choose k."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run folders of train.py with experts"""
    dense: tuple[Path, ...] = ()
    """run folders of dense models, from which each run is compared with the one of its seed"""
    data: Path | None = None
    """the prepared text; default: the one of each run"""
    k: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    """uniform numbers of active experts"""
    flops: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)
    """budgets of plans, as fractions of the experts' FLOPs"""
    times: tuple[float, ...] = (0.5,)
    """budgets of plans by time: that of the uniform k which is this fraction of the experts"""
    p: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    """gate masses of thresholds"""
    calibration: int = 16_384
    """positions of the validation split that plans are made on"""
    held_out: int | None = None
    """positions of the test split that quality is measured on; default: all"""
    timed: int = 8_192
    """positions of the test split in a timed pass"""
    rounds: int = 9
    """measured rounds, after one warm-up round"""
    out: Path = RECORDS
    """folder of the records, one for each run"""

    @property
    def clock(self) -> Callable[[], float]:
        """One thread of a CPU counts the time in which it computes, so that other processes do not disturb it."""
        return time.thread_time if self.threads == 1 and self.device == "cpu" else time.perf_counter


@dataclass(frozen=True)
class Trained:
    """A trained model with its task, and what its record says of it."""

    about: dict[str, Any]
    task: Task
    model: nn.Module

    @property
    def experts(self) -> int:
        """Experts of the largest MoE layer; 0 for a dense model."""
        return max((layer.num_experts for _, layer in sd.moe_layers(self.model)), default=0)

    def passes(self, split: str, positions: int | None) -> list[Pass]:
        """Passes over the beginning of a split, in order; the first forgets what was read before."""
        found, read, state = [], 0, None
        for batch in self.task.held_out(split):
            if positions is not None and read >= positions:
                break

            def run(batch=batch) -> float:
                nonlocal state
                total, count, state = self.task.measure(self.model, batch, None if batch.first else state)
                return total / count

            found.append((run, torch.ones(batch.targets, dtype=torch.bool)))
            read += batch.targets
        return found

    def flops_per_token(self, mean_k: dict[str, float]) -> float:
        """FLOPs of the model per token, with this mean number of experts in each layer."""
        shape, layers = self.task.evaluation_shape, sd.moe_layers(self.model)
        whole = forward_flops(self.task.flags.model, self.model, shape, self.experts or None) / (shape.rows * shape.positions)
        one = {name: 2 * (layer.experts.up[0].numel() + layer.experts.down[0].numel()) for name, layer in layers}
        return whole - sum(one[name] * (layer.num_experts - mean_k[name]) for name, layer in layers)


@dataclass(frozen=True)
class Way:
    """A way to choose k. setting: its k, budget or p. ks: of the layers, where they are numbers. plan: what planning measured."""

    kind: str
    setting: float
    contestant: Trained
    select: Callable[[], AbstractContextManager]
    plan: sd.Plan | None = None

    @property
    def name(self) -> str:
        """Key among the ways."""
        return f"{self.kind} {self.setting:g}"


def open_trained(path: Path, data: Path | None, device: Device, threads: int) -> Trained:
    """The model of a finished run for inference, in the run's precision. UserError for one that cannot be measured."""
    source = open_run(path)
    given = {"data": str(data or source.made.data), "device": device, "threads": threads}
    flags = replace(source.made, **given, **{name: getattr(Flags, name) for name in names(role="start")})
    engine = Engine(flags)
    run = pretraining_run(flags, open_text(flags.data, source), engine, source)
    if not run.task.metric.of_loss:
        raise UserError(f"{path} is measured by {run.task.metric.name}, which does not follow from a loss: give another run")
    about = {name: value for name, value in read_record(path / "result.json").items() if name in KEPT}
    return Trained(about | {"name": path.resolve().name}, run.task, engine.prepare(run.build()).eval())


def ways_of(trained: Trained, flags: TradeoffFlags) -> list[Way]:
    """The ways to choose k of a model: uniform, planned, and by thresholds; among the uniform k are those that plans are compared with."""
    model, E = trained.model, trained.experts
    calibration = trained.passes("valid", flags.calibration)
    plans = [(FLOPS, share, sd.plan(model, calibration, flops=share)) for share in flags.flops]
    plans += [(TIME, share, planned_by_time(trained, calibration, max(1, round(share * E)), flags)) for share in flags.times]
    ks = sorted({k for k in flags.k if k <= E} | {plan.uniform for *_, plan in plans})
    found = [Way(UNIFORM, k, trained, partial(sd.top_k, model, k)) for k in ks]
    found += [Way(kind, share, trained, partial(sd.top_k, model, plan), plan) for kind, share, plan in plans]
    if all(isinstance(layer.router, LinearRouter) for _, layer in sd.moe_layers(model)):
        found += [Way(MASS, p, trained, partial(sd.top_p, model, p)) for p in flags.p]
    return found


def planned_by_time(trained: Trained, passes: list[Pass], k: int, flags: TradeoffFlags) -> sd.Plan:
    """A plan with the time of a uniform k as its budget, or somewhat more if the machine has become slower since that was measured."""
    milliseconds = time_of(trained, passes, k, flags)
    for _ in range(20):
        with suppress(ConfigError):
            return sd.plan(trained.model, passes, milliseconds=milliseconds, repeats=3)
        milliseconds *= 1.1
    raise UserError(f"{trained.about['name']}: the machine is too unsteady for a plan by time, leave it out with --times")


def time_of(trained: Trained, passes: list[Pass], k: int, flags: TradeoffFlags) -> float:
    """Milliseconds of a mean pass at a uniform k."""
    with sd.top_k(trained.model, k):
        seconds = interleave({"": lambda: [run() for run, _ in passes]}, 3, flags.device, flags.clock)[""]
    return 1e3 * statistics.median(seconds) / len(passes)


def quality(way: Way, positions: int | None) -> dict[str, Any]:
    """Metric on the test split, and what it costs by the experts that were chosen."""
    trained, model = way.contestant, way.contestant.model
    total, count, chosen = 0.0, 0, {name: 0.0 for name, _ in sd.moe_layers(model)}
    with way.select():
        for run, mask in trained.passes("test", positions):
            total += len(mask) * run()
            count += len(mask)
            for name, mean in sd.mean_k(model).items():
                chosen[name] += mean * len(mask)
    mean_k = {name: value / count for name, value in chosen.items()}
    found = {trained.task.metric.name: trained.task.metric.of(total / count), "positions": count}
    return found | {"mean_k": list(mean_k.values()), "flops_per_token": trained.flops_per_token(mean_k)}


def timed(way: Way, positions: int) -> Callable[[], None]:
    """Returns a function that reads the beginning of the test split."""
    passes = way.contestant.passes("test", positions)

    def read() -> None:
        with way.select():
            for run, _ in passes:
                run()

    return read


def planning(plan: sd.Plan) -> dict[str, Any]:
    """Costs and losses that planning measured on the calibration data."""
    fields = ("unit", "budget", "predicted", "measured", "loss", "uniform", "uniform_measured", "uniform_loss", "evaluations")
    return {"k": list(plan.values()), **{name: getattr(plan, name) for name in fields}}


@torch.no_grad()
def measure(trained: Trained, dense: Trained | None, flags: TradeoffFlags) -> dict[str, Any]:
    """The record of a run: a row for each way to choose k, and for the dense model. Times are relative to it, or to k = E without one."""
    ways = ways_of(trained, flags)
    baseline = f"{UNIFORM} {max(way.setting for way in ways if way.kind == UNIFORM):g}"
    if dense is not None:
        ways.append(Way(DENSE, 0, dense, nullcontext))
        baseline = ways[-1].name
    rows = [{"kind": way.kind, "setting": way.setting, **quality(way, flags.held_out)} for way in ways]
    times = summarise(interleave({way.name: timed(way, flags.timed) for way in ways}, flags.rounds, flags.device, flags.clock), baseline)
    for way, row in zip(ways, rows, strict=True):
        row |= times[way.name] | ({} if way.plan is None else {"plan": planning(way.plan)})
    sizes = {"calibration": flags.calibration, "held_out": flags.held_out, "timed": flags.timed, "rounds": flags.rounds}
    sizes["clock"] = flags.clock.__name__
    found = {"schema": SCHEMA, "benchmark": "tradeoff", "run": trained.about, "dense": dense.about if dense else None}
    return found | {"sizes": sizes, "baseline": baseline, "rows": rows, "environment": describe_environment(trained.task.engine)}


def run(flags: TradeoffFlags) -> None:
    """Measures every run, and writes a record of each. UserError for runs without experts, and for dense ones with them."""
    if not flags.runs:
        raise UserError("no run is given: python -m benchmarks tradeoff RUN... --dense DENSE_RUN...")
    dense = [open_trained(path, flags.data, flags.device, flags.threads) for path in flags.dense]
    if wrong := [one.about["name"] for one in dense if one.experts]:
        raise UserError(f"--dense {wrong[0]} has experts: give it among the runs")
    for path in flags.runs:
        trained = open_trained(path, flags.data, flags.device, flags.threads)
        if not trained.experts:
            raise UserError(f"{path} is dense: give it by --dense")
        seed, metric = trained.about["seed"], trained.about["metric"]
        other = next((one for one in dense if (one.about["seed"], one.about["metric"]) == (seed, metric)), None)
        if dense and other is None:
            raise UserError(f"{path} has seed {seed}, and none of --dense has: give a dense run of that seed, or none at all")
        with trained.task.evaluation(trained.model), other.task.evaluation(other.model) if other else nullcontext():
            record = measure(trained, other, flags)
        flags.out.mkdir(parents=True, exist_ok=True)
        documents.write(flags.out / f"{trained.about['name']}.json", record)
        print(f"measured {path}: {flags.out / trained.about['name']}.json")
