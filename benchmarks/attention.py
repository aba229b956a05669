"""Attention with relative positions, forward and backward: ours against the published way (`OfficialAttention`)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Common, Precision, autocast, compare
from benchmarks.peers import OfficialAttention
from mem_transformer import RelativeAttention, TransformerXLConfig

OURS, BASELINE = "ours", "official style"


@dataclass(frozen=True)
class AttentionFlags(Common):
    """Time of one attention module over the official way to compute it."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    batch_size: int = 4
    """lanes"""
    tgt_len: int = 256
    """positions per segment"""
    mem_len: int = 256
    """positions of memory"""
    n_head: int = 8
    """attention heads"""
    d_head: int = 64
    """width of a head"""
    d_model: int = 256
    """width of the model"""


def contestants(flags: AttentionFlags) -> dict[str, nn.Module]:
    """The same attention computed both ways, each with its own copy of the weights."""
    torch.manual_seed(0)
    sizes = {name: getattr(flags, name) for name in ("n_head", "d_head", "d_model", "mem_len")}
    ours = RelativeAttention(TransformerXLConfig(n_token=1, **sizes))
    return {BASELINE: OfficialAttention(copy.deepcopy(ours)).to(flags.device), OURS: ours.to(flags.device)}


def inputs(flags: AttentionFlags) -> tuple[Tensor, ...]:
    """x, memory, positions, biases and mask. All but the memory, the positions and the mask need gradients, as in training."""
    B, T, M, D = flags.batch_size, flags.tgt_len, flags.mem_len, flags.d_model
    where = {"device": flags.device}
    x_BTD = torch.randn(B, T, D, requires_grad=True, **where)
    bias_2H11C = torch.randn(2, flags.n_head, 1, 1, flags.d_head, requires_grad=True, **where)
    mask_TK = torch.full((T, M + T), -torch.inf, **where).triu(1 + M)
    return x_BTD, torch.randn(B, M, D, **where), torch.randn(M + T, D, **where), bias_2H11C, mask_TK


def forward_backward(attention: nn.Module, given: tuple[Tensor, ...], grad_BTD: Tensor, precision: Precision) -> tuple[Tensor, ...]:
    """Output, and gradients of the inputs that need one and of the parameters."""
    with autocast(precision, grad_BTD.device.type):
        y_BTD = attention(*given)
    leaves = [tensor for tensor in (*given, *attention.parameters()) if tensor.requires_grad]
    return y_BTD, *torch.autograd.grad(y_BTD, leaves, grad_BTD.to(y_BTD.dtype))


def measure_row(flags: AttentionFlags, precision: Precision) -> dict[str, Any]:
    """Measures both in one precision."""
    modules, given = contestants(flags), inputs(flags)
    grad_BTD = torch.randn_like(given[0])

    def call(module: nn.Module) -> Callable[[], Any]:
        return lambda: forward_backward(module, given, grad_BTD, precision)

    calls = {name: call(module) for name, module in modules.items()}
    return {"precision": precision, "results": compare(calls, flags, BASELINE)}


def rows(flags: AttentionFlags) -> list[dict[str, Any]]:
    """A row for each precision."""
    return [measure_row(flags, precision) for precision in flags.precision]
