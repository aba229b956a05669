"""Interleaved timing. Contestants take turns in one process, in another order each round, and each is compared with the baseline of its
own round, so that what slows the machine down for a while slows both.

Peak memory is left out: on a CPU the process's peak only grows. `kept_mib` counts what is kept for the backward pass instead.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from utils.engine import Engine
from utils.run_folder import describe_environment, write_json

SCHEMA = 1
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Common:
    """Flags that every benchmark has."""

    threads: int = 1
    """torch's threads"""
    rounds: int = 9
    """rounds measured, after one that warms up"""
    out: Path = Path("results/benchmarks")
    """folder of the record, <benchmark>.json"""


def interleave(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, the warm-up round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(calls), len(calls)):  # another order each round: nobody always follows the same one
            begin = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in seconds.items()}


def summarise(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """For each contestant the median seconds, and the median, least and largest ratio to the baseline of the same round."""
    found = {}
    for name, values in seconds.items():
        ratios = [own / base for own, base in zip(values, seconds[baseline], strict=True)]
        spread = {"ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4)}
        found[name] = {"seconds": round(statistics.median(values), 6), "ratio": round(statistics.median(ratios), 4), **spread}
    return found


def kept_mib(forward: Callable[[], Any], owned: Iterable[Tensor]) -> float:
    """MiB of distinct buffers that `forward` keeps for its backward pass, besides the `owned` ones (parameters, inputs)."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in owned}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until all is counted, lest a buffer's place be taken by another
    total = sum(kept.values())
    del result
    return round(total / 2**20, 1)


def autocast(precision: Precision):
    """bf16 as in training: parameters stay float32 and are cast in every pass."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


class Host:
    """This machine, as far as `describe_environment` asks an engine."""

    device, world_size, accelerator = torch.device("cpu"), 1, SimpleNamespace(mixed_precision="no")
    device_name = Engine.device_name


def environment() -> dict[str, Any]:
    """Commit, versions, CPU, threads."""
    found = describe_environment(Host())
    del found["precision"]  # each row of a record has its own
    return found | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}


def record(benchmark: str, flags: Common, baseline: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a benchmark, written to `flags.out` and returned. A row: what it is of, and `results` by contestant."""
    sizes = {name: value for name, value in asdict(flags).items() if name not in ("out", "threads")}
    found = {"schema": SCHEMA, "benchmark": benchmark, "baseline": baseline, "sizes": sizes, "rows": rows, "environment": environment()}
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(flags.out / f"{benchmark}.json", found)
    return found
