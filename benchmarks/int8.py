"""python -m benchmarks.int8 --runs RUN ... --data FOLDER: what experts in 8 bits lose, in bits per byte of the test text of trained
Transformer-XL runs, at each k; the record is int8.json.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.measure import SCHEMA, environment
from mem_transformer import MemTransformerLM
from smoe_dropout import slim
from utils import documents
from utils.checkpoints import weights
from utils.checkpoints.origin import open_run
from utils.models.build import build_model


@dataclass(frozen=True)
class Int8Flags:
    """Loss of trained runs with experts in float32 and in 8 bits."""

    runs: tuple[Path, ...]
    """finished runs"""
    data: Path
    """folder of the text that they were trained on"""
    k: tuple[int, ...] = (1, 4, 16)
    """numbers of active experts"""
    lanes: int = 32
    """sequences read side by side"""
    segments: int = 30
    """segments read of each, as long as in training"""
    out: Path = Path("results/benchmarks")
    """folder of the record"""


@torch.no_grad()
def bits(model: MemTransformerLM, text_BT: Tensor, segment: int) -> float:
    """Bits per byte of a text, read with a cache."""
    cache, nats = None, 0.0
    for begin in range(0, text_BT.shape[1] - 1, segment):
        part = text_BT[:, begin : begin + segment + 1]
        logits_BTV, cache = model.read(part[:, :-1], cache)
        nats += F.cross_entropy(logits_BTV.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / text_BT[:, 1:].numel()


def rows(run: Path, flags: Int8Flags) -> list[dict[str, Any]]:
    """A row for each k of a run."""
    source = open_run(run)
    model, made = build_model(source.made).eval(), source.made
    weights.load(model, source)
    model.mem_len = made.mem_len + made.tgt_len - 1
    text = torch.from_numpy(np.fromfile(flags.data / "test.bin", np.uint8).astype(np.int64))
    text_BT = text[: len(text) // flags.lanes * flags.lanes].view(flags.lanes, -1)[:, : flags.segments * made.tgt_len + 1]
    found = []
    for k in flags.k:
        loss = {name: bits(slim(model, k, dtype), text_BT, made.tgt_len) for name, dtype in (("fp32", None), ("int8", torch.int8))}
        found.append({"run": run.name, "k": k, **{name: round(value, 5) for name, value in loss.items()}})
    return found


def main(flags: Int8Flags) -> None:
    """Measures all runs, prints and writes what was found."""
    torch.set_num_threads(1)
    found = [row for run in flags.runs for row in rows(run, flags)]
    sizes = {"data": flags.data.name, "lanes": flags.lanes, "segments": flags.segments}
    record = {"schema": SCHEMA, "benchmark": "int8", "sizes": sizes, "rows": found, "environment": environment("cpu", [])}
    documents.write(flags.out / "int8.json", record)
    for row in found:
        print(f"{row['run']}, k = {row['k']}: {row['fp32']:.4f}, int8 {row['int8']:.4f} ({row['int8'] - row['fp32']:+.5f})")


if __name__ == "__main__":
    main(tyro.cli(Int8Flags))
