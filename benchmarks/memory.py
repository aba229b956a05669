"""Peak memory of one training step of Transformer-XL, by default at the paper's size. Nothing is timed."""

from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Precision, peak_mib
from benchmarks.model import OFFICIAL, contestants
from benchmarks.step import StepFlags, training_step

BASELINE = OFFICIAL


@dataclass(frozen=True)
class MemoryFlags(StepFlags):
    """Peak memory of a training step beside that of the same model computed the official way."""

    threads: int = 2
    """torch's threads"""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, bf16 or both"""
    batch_size: int = 22
    """lanes"""
    tgt_len: int = 512
    """positions per segment, and of memory"""


def rows(flags: MemoryFlags) -> list[dict[str, Any]]:
    """A row for each precision: MiB by contestant."""
    found = []
    for precision in flags.precision:
        models = contestants(flags, flags.k)
        peaks = {name: {"peak_mib": peak_mib(training_step(models.pop(name), flags, precision), flags.device)} for name in list(models)}
        found.append({"precision": precision, "k": flags.k, "results": peaks})
    return found
