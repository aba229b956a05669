"""Scaling of time: the expert layer by experts, their width and tokens, and the attention by memory; one size grows at a time."""

from dataclasses import dataclass
from typing import Any

from benchmarks import attention, layer
from benchmarks.measure import Common, Precision
from benchmarks.peers import FASTMOE

BASELINE = None  # each row names its own
WAYS = (layer.BASELINE, layer.AUTO, FASTMOE)


@dataclass(frozen=True)
class GrowthFlags(Common):
    """Time of the layer and of the attention while one size grows. k is half of the experts."""

    rounds: int = 5
    """rounds measured, after one that warms up"""
    precision: Precision = "fp32"
    """fp32 or bf16"""
    num_experts: tuple[int, ...] = (4, 16, 64, 256)
    """experts, which share `width` among them: equal operations"""
    d_expert: tuple[int, ...] = (32, 128, 512, 2048)
    """hidden widths of an expert"""
    tokens: tuple[int, ...] = (1, 16, 256, 4096, 65536)
    """tokens per pass"""
    mem_len: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    """positions of memory"""
    tgt_len: int = 256
    """positions per segment of the attention"""
    d_model: int = 256
    """width of the model"""
    width: int = 8192
    """hidden width of all experts together, while experts grow"""
    fixed_experts: int = 16
    """experts, while something else grows"""
    fixed_tokens: int = 2048
    """tokens per pass, while something else grows"""
    narrow: int = 128
    """hidden width of an expert while tokens grow: 65,536 of them on 512 take more than 20 GiB"""


def layer_rows(flags: GrowthFlags, axis: str) -> list[dict[str, Any]]:
    """A row for each value of one of the layer's sizes."""
    found = []
    for value in getattr(flags, axis):
        sizes = {"num_experts": flags.fixed_experts, "tokens": flags.fixed_tokens, axis: value}
        sizes.setdefault("d_expert", flags.narrow if axis == "tokens" else flags.width // sizes["num_experts"])
        grown = layer.LayerFlags(d_model=flags.d_model, rounds=flags.rounds, device=flags.device, **sizes)
        row = layer.measure_row(grown, flags.precision, sizes["num_experts"] // 2, WAYS)
        found.append({"axis": axis, "value": value, "baseline": layer.BASELINE, **row})
    return found


def attention_rows(flags: GrowthFlags) -> list[dict[str, Any]]:
    """A row for each length of memory."""
    settings = {"tgt_len": flags.tgt_len, "d_model": flags.d_model, "rounds": flags.rounds, "device": flags.device}
    grown = [attention.AttentionFlags(mem_len=length, **settings) for length in flags.mem_len]
    return [
        {"axis": "mem_len", "value": one.mem_len, "baseline": attention.BASELINE, **attention.measure_row(one, flags.precision)}
        for one in grown
    ]


def rows(flags: GrowthFlags) -> list[dict[str, Any]]:
    """A row for each value of each size."""
    return [row for axis in ("num_experts", "d_expert", "tokens") for row in layer_rows(flags, axis)] + attention_rows(flags)
