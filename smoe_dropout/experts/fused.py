"""Dense experts for CUDA: every token through every expert, as matrix products of all experts at once and one Triton kernel between them.

The kernel adds the bias, activates, drops and weighs in one pass, so that forward reads and writes [N, E * H] once between its two
products. Forward and backward never wait for the device and no size depends on the data, so a CUDA graph can hold them.
"""

from __future__ import annotations  # tl is not there where Triton is not

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # `refusal` says so
    triton = None

jit = triton.jit if triton else lambda kernel: kernel
COMPUTED = ("relu", "gelu", "gelu_tanh", "silu")
BLOCK_N, MAX_BLOCK_H, WARPS = 32, 128, 8  # a tile's tokens, its hidden columns, and 16 values a thread: not measured


def refusal(weights, device: str) -> str | None:
    if triton is None:
        return "Triton is not installed (it comes with torch's CUDA builds)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its Triton kernels need CUDA tensors, and these are on {device!r}, where only TRITON_INTERPRET=1 runs them, slowly"
    if weights.activation not in COMPUTED:
        return f"its kernels compute {', '.join(COMPUTED)}, not {weights.activation}"
    if weights.up_EHD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32 and do not take {weights.up_EHD.dtype}"
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    gate_NE = weights_NK.new_zeros(x_ND.shape[0], weights.up_EHD.shape[0]).scatter(1, indices_NK, weights_NK)
    tensors = (weights.up_EHD, weights.bias_up_EH.contiguous(), weights.down_EHD, weights.bias_down_ED)
    with torch.cuda.device_of(x_ND):  # where Triton launches; autograd sees to it in backward
        return FusedExperts.apply(x_ND, gate_NE, *tensors, weights.activation, weights.dropout)


class FusedExperts(torch.autograd.Function):
    """gate [N, E]: the gate weight of each expert, 0 if it was not chosen. F = E * H: the hidden columns of all experts, side by side.

    Kept for backward are pre and weighted [N, F]. Forward writes weighted in any case, for its second product, so that keeping it for the
    gradient of down costs memory and no traffic; computing it again from pre would cost backward another write of [N, F].
    """

    @staticmethod
    def forward(ctx, x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, activation, dropout):
        # on the device, so that nobody waits for it and a replayed CUDA graph draws another
        seed = torch.randint(2**62, (), device=x_ND.device) if dropout > 0 else None
        pre_NF = x_ND @ up_EHD.flatten(0, 1).t()
        weighted_NF = torch.empty_like(pre_NF)
        _launch(_forward_kernel, pre_NF, bias_up_EH, gate_NE, weighted_NF, seed=seed, dropout=dropout, activation=activation)
        ctx.save_for_backward(x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, pre_NF, weighted_NF, seed)
        ctx.activation, ctx.dropout = activation, dropout
        return torch.addmm(gate_NE @ bias_down_ED, weighted_NF, down_EHD.flatten(0, 1))

    @staticmethod
    def backward(ctx, grad_ND):
        if torch.is_grad_enabled():
            raise RuntimeError("the fused backend cannot be differentiated twice: use backend='reference'")
        x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, pre_NF, weighted_NF, seed = ctx.saved_tensors
        grad_NF = grad_ND @ down_EHD.flatten(0, 1).t()  # of weighted, which the kernel overwrites with that of pre
        grad_gate = torch.empty_like(gate_NE, dtype=torch.float32)
        # sums over the tokens of a tile: a few rows, where summing over grad_NF would read all of it again; and in a fixed order
        grad_bias_BF = grad_gate.new_empty(triton.cdiv(len(x_ND), BLOCK_N), grad_NF.shape[1])
        tensors = (pre_NF, bias_up_EH, gate_NE, grad_NF, grad_gate, grad_bias_BF)
        _launch(_backward_kernel, *tensors, seed=seed, dropout=ctx.dropout, activation=ctx.activation)
        grad_x, grad_up = grad_NF @ up_EHD.flatten(0, 1), (grad_NF.t() @ x_ND).view(up_EHD.shape)
        grad_bias_up = grad_bias_BF.sum(0).view(bias_up_EH.shape).to(x_ND.dtype)
        grad_down, grad_bias_down = (weighted_NF.t() @ grad_ND).view(down_EHD.shape), gate_NE.t() @ grad_ND
        grad_gate = grad_gate.add_(grad_ND @ bias_down_ED.t()).to(gate_NE.dtype)
        return grad_x, grad_gate, grad_up, grad_bias_up, grad_down, grad_bias_down, None, None


def _launch(kernel, pre_NF, bias_up_EH, gate_NE, *others: Tensor, seed: Tensor | None, dropout: float, activation: str) -> None:
    """One program for every expert and `BLOCK_N` tokens."""
    (N, E), H = gate_NE.shape, bias_up_EH.shape[1]
    block_H = min(MAX_BLOCK_H, max(4, triton.next_power_of_2(H)))
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    sizes = (seed, dropout, scale, N, E, H, activation, BLOCK_N, block_H)
    kernel[triton.cdiv(N, BLOCK_N), E](pre_NF, bias_up_EH, gate_NE, *others, *sizes, num_warps=WARPS)


@jit
def _activate(pre, ACTIVATION: tl.constexpr):
    """The hidden values, and the derivative there, which costs nothing where it is not used."""
    if ACTIVATION == "relu":  # what is not a number stays so, as in torch
        hidden, slope = tl.where(pre <= 0, 0.0, pre), tl.where(pre <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":  # pre * P(standard normal < pre)
        below = 0.5 + 0.5 * tl.erf(pre * 0.7071067811865476)
        hidden, slope = pre * below, below + pre * 0.3989422804014327 * tl.exp(-0.5 * pre * pre)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z), and 2 z = pre * (a + b * pre^2)
        share = tl.sigmoid(pre * (1.5957691216057308 + 0.07135481282553624 * pre * pre))
        hidden = pre * share
        slope = share + hidden * (1 - share) * (1.5957691216057308 + 0.21406443847660872 * pre * pre)
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = tl.sigmoid(pre)
        hidden, slope = pre * share, share + pre * share * (1 - share)
    return hidden, slope


@jit
def _kept(seed_ptr, p, scale, row_N, start, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """Inverted dropout: a tile of 0 with probability p, else scale. row: the token's row of experts [N * E].

    A function of seed, token, expert and column alone, so that backward draws what forward drew. The four numbers of a call of the
    generator, some hundred instructions, serve four columns.
    """
    quad_Q = start // 4 + tl.arange(0, BLOCK_H // 4)
    a, b, c, d = tl.rand4x(tl.load(seed_ptr), row_N[:, None] * ((H + 3) // 4) + quad_Q[None, :])
    uniform = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_N, BLOCK_H))
    return tl.where(uniform < p, 0.0, scale)


@jit
def _load_pre(pre_ptr, bias_ptr, row_N, inside_N, start, expert, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """A tile of pre + bias, where it stands in [N, F], which of it is inside, and its columns of the expert."""
    column_H = start + tl.arange(0, BLOCK_H)
    at, inside = row_N[:, None] * H + column_H[None, :], inside_N[:, None] & (column_H < H)[None, :]
    bias_H = tl.load(bias_ptr + expert * H + column_H, mask=column_H < H, other=0.0).to(tl.float32)
    return tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias_H[None, :], at, inside, column_H


@jit
def _forward_kernel(
    pre_ptr,
    bias_ptr,
    gate_ptr,
    weighted_ptr,
    seed_ptr,
    p,
    scale,
    N,
    E,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """weighted = gate * dropout(activation(pre + bias)), in tiles of an expert's columns."""
    expert = tl.program_id(1)
    token_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # 64 bits: N * E * H may exceed 2^31
    row_N, inside_N = token_N * E + expert, token_N < N
    gate_N = tl.load(gate_ptr + row_N, mask=inside_N, other=0.0).to(tl.float32)
    for start in range(0, H, BLOCK_H):
        pre, at, inside, _ = _load_pre(pre_ptr, bias_ptr, row_N, inside_N, start, expert, H, BLOCK_H)
        hidden, _ = _activate(pre, ACTIVATION)
        if seed_ptr is not None:
            hidden *= _kept(seed_ptr, p, scale, row_N, start, H, BLOCK_N, BLOCK_H)
        tl.store(weighted_ptr + at, hidden * gate_N[:, None], mask=inside)


@jit
def _backward_kernel(
    pre_ptr,
    bias_ptr,
    gate_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_bias_ptr,
    seed_ptr,
    p,
    scale,
    N,
    E,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grad: of weighted, overwritten with that of pre. One program sees all columns of its expert, and so adds up the gradient of gate."""
    block, expert = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N, inside_N = token_N * E + expert, token_N < N
    gate_N = tl.load(gate_ptr + row_N, mask=inside_N, other=0.0).to(tl.float32)
    grad_gate_N = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, H, BLOCK_H):
        pre, at, inside, column_H = _load_pre(pre_ptr, bias_ptr, row_N, inside_N, start, expert, H, BLOCK_H)
        hidden, slope = _activate(pre, ACTIVATION)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            grad *= _kept(seed_ptr, p, scale, row_N, start, H, BLOCK_N, BLOCK_H)
        grad_gate_N += tl.sum(grad * hidden, 1)
        grad_pre = grad * slope * gate_N[:, None]
        tl.store(grad_ptr + at, grad_pre, mask=inside)
        tl.store(grad_bias_ptr + (block * E + expert) * H + column_H, tl.sum(grad_pre, 0), mask=column_H < H)
    tl.store(grad_gate_ptr + row_N, grad_gate_N, mask=inside_N)
