"""One training step of the whole Transformer-XL as train.py takes it: forward, backward, clipping, Adam; memory from the step before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import Common, Precision, autocast, interleave, kept_mib, record, summarise
from benchmarks.peers import official_style
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout import SMoEConfig, moefy
from utils.flags import Flags
from utils.optimizer import build_optimizer

OFFICIAL, OURS, DENSE = "official style, experts", "ours, experts", "ours, dense"
N_TOKEN = 256


@dataclass(frozen=True)
class StepFlags(Common):
    """Time of a whole training step over that of the same model computed the official way."""

    threads: int = 2
    """torch's threads"""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, bf16 or both"""
    k: int = 8
    """active experts"""
    num_experts: int = 16
    """experts per layer"""
    n_layer: int = 4
    """layers"""
    n_head: int = 8
    """attention heads"""
    d_head: int = 64
    """width of a head"""
    d_model: int = 256
    """width of the model"""
    d_expert: int = 512
    """hidden width of an expert; the dense network has that of all experts together"""
    batch_size: int = 4
    """lanes"""
    tgt_len: int = 256
    """positions per segment, and of memory"""
    dropout: float = 0.0
    """dropout rate"""


def contestants(flags: StepFlags) -> dict[str, MemTransformerLM]:
    """The same model with experts computed both ways, and the dense one of equal parameters."""
    torch.manual_seed(0)
    names = ("n_layer", "n_head", "d_model", "d_head", "dropout")
    sizes = {name: getattr(flags, name) for name in names}
    config = TransformerXLConfig(N_TOKEN, d_inner=flags.num_experts * flags.d_expert, mem_len=flags.tgt_len, **sizes)
    ours = moefy(MemTransformerLM(config), SMoEConfig(num_experts=flags.num_experts, top_k=flags.k))
    return {OFFICIAL: official_style(ours), OURS: ours, DENSE: MemTransformerLM(config)}


def training_step(model: MemTransformerLM, flags: StepFlags, precision: Precision) -> Callable[[], float]:
    """A function that takes one step and returns the loss before it. It has run once, so that there is memory."""
    settings = Flags()
    optimizer = build_optimizer(model.train(), settings)
    batch = torch.randint(N_TOKEN, (flags.batch_size, flags.tgt_len + 1), generator=torch.Generator().manual_seed(1))
    memory = None

    def step() -> float:
        nonlocal memory
        with autocast(precision):
            losses, memory, _ = model(batch[:, :-1], batch[:, 1:], memory)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step()
    return step


def kept_by(model: MemTransformerLM, flags: StepFlags, precision: Precision) -> float:
    """MiB kept for the backward pass of one step with memory."""
    tokens = torch.zeros(flags.batch_size, flags.tgt_len, dtype=torch.int64)
    with torch.no_grad():
        _, memory, _ = model(tokens, tokens)

    def forward():
        with autocast(precision):
            return model(tokens, tokens, memory)

    return kept_mib(forward, [*model.parameters(), tokens, *memory])


def measure_row(flags: StepFlags, precision: Precision) -> dict[str, Any]:
    """All contestants in one precision."""
    models = contestants(flags)
    steps = {name: training_step(model, flags, precision) for name, model in models.items()}
    results = summarise(interleave(steps, flags.rounds), OFFICIAL)
    for name, model in models.items():
        results[name]["kept_mib"] = kept_by(model, flags, precision)
    return {"precision": precision, "k": flags.k, "results": results}


def run(flags: StepFlags) -> dict[str, Any]:
    """Measures and writes the record."""
    return record("step", flags, OFFICIAL, [measure_row(flags, precision) for precision in flags.precision])
