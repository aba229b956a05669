"""Interleaved timing. Contestants take turns in one process, in a different order each round, and each is compared with the baseline of its
own round, so that a temporary slowdown of the machine affects both.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from utils import documents
from utils.engine import Engine
from utils.training.run_folder import describe_environment

SCHEMA = 1
Precision = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler writes two lines whenever it is used


@dataclass(frozen=True)
class Common:
    """Flags that every benchmark has."""

    threads: int = 1
    """torch's threads"""
    rounds: int = 9
    """rounds measured, after one that warms up"""
    out: Path = Path("results/benchmarks")
    """folder of the record, <benchmark>.json"""
    device: Device = "cpu"
    """where to compute"""
    tuned: bool = False
    """set torch up for this CPU first (smoe_dropout.tune_cpu)"""


def interleave(
    calls: dict[str, Callable[[], Any]], rounds: int, device: Device = "cpu", clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call in each round, the warm-up round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(calls), len(calls)):  # another order each round: nobody always follows the same one
            begin = clock()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - begin)
    return {name: values[1:] for name, values in seconds.items()}


def summarise(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """For each contestant the median seconds, and the median, least and largest ratio to the baseline of the same round."""
    found = {}
    for name, values in seconds.items():
        ratios = [own / base for own, base in zip(values, seconds[baseline], strict=True)]
        spread = {"ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4)}
        found[name] = {"seconds": round(statistics.median(values), 6), "ratio": round(statistics.median(ratios), 4), **spread}
    return found


def peak_mib(call: Callable[[], Any], device: Device = "cpu") -> float:
    """Peak memory in MiB that torch allocates during `call`, without memory allocated before it.

    Counted at torch's allocator. The peak of a whole process on a CPU would count freed memory that the C library holds back, too.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)
    return round(peak / 2**20, 1)


def compare(calls: dict[str, Callable[[], Any]], flags: Common, baseline: str) -> dict[str, dict[str, Any]]:
    """Time and, of one more call each, peak memory."""
    results = summarise(interleave(calls, flags.rounds, flags.device), baseline)
    for name, call in calls.items():
        results[name]["peak_mib"] = peak_mib(call, flags.device)
    return results


def autocast(precision: Precision, device: Device = "cpu"):
    """bf16 as in training: parameters stay float32 and are cast in every pass."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


class Host:
    """This machine, with the attributes that `describe_environment` reads from an engine."""

    world_size, accelerator = 1, SimpleNamespace(mixed_precision="no")
    device_name = Engine.device_name

    def __init__(self, device: Device, tuned: Sequence[str]):
        self.device, self.tuned = torch.device(device), list(tuned)


def environment(device: Device, tuned: Sequence[str]) -> dict[str, Any]:
    """Commit, versions, hardware, threads, and what `tune_cpu` did."""
    found = describe_environment(Host(device, tuned))
    del found["precision"]  # each row of a record has its own
    return found | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}


def record(benchmark: str, flags: Common, baseline: str | None, rows: list[dict[str, Any]], tuned: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a benchmark, written to `flags.out` and returned. A row: what it is of, and `results` by contestant.

    baseline: whose time is 1; None where each row names its own. tuned: what `tune_cpu` did.
    """
    sizes = {name: value for name, value in asdict(flags).items() if name not in ("out", "threads", "device", "tuned")}
    found = {"schema": SCHEMA, "benchmark": benchmark, "baseline": baseline, "sizes": sizes, "rows": rows}
    found["environment"] = environment(flags.device, tuned)
    flags.out.mkdir(parents=True, exist_ok=True)
    documents.write(flags.out / f"{benchmark}.json", found)
    return found
