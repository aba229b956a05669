"""Dense experts for CUDA: every token through every expert, with one Triton kernel between two matrix products over all experts.

The kernel adds the bias, applies activation and dropout and multiplies by gate weights in one pass, so that the forward pass reads and
writes [N, E * H] once between its products. Forward and backward do not synchronise with the device and no size depends on the data, so
both can be captured in a CUDA graph.
"""

from __future__ import annotations  # annotations use tl, which is undefined without Triton

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # reported by `refusal`
    triton = None

jit = triton.jit if triton else lambda kernel: kernel
RAGGED = True
COMPUTED = ("relu", "gelu", "gelu_tanh", "silu")
BLOCK_N, MAX_BLOCK_H, WARPS = 32, 128, 8  # tokens and hidden columns of a tile, 16 values per thread: not tuned


def refusal(weights, device: str) -> str | None:
    """Reason why this backend cannot run, or None."""
    if triton is None:
        return "Triton is not installed (it comes with torch's CUDA builds)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its Triton kernels need CUDA tensors, but these are on {device!r}, where they only run, slowly, with TRITON_INTERPRET=1"
    if weights.activation not in COMPUTED:
        return f"its kernels support {', '.join(COMPUTED)}, not {weights.activation}"
    if weights.up_EHD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32 and do not support {weights.up_EHD.dtype}"
    return None


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    gate_NE = weights.gates(indices_NK, weights_NK)
    tensors = (weights.up_EHD, weights.bias_up_EH.contiguous(), weights.down_EHD, weights.bias_down_ED)
    with torch.cuda.device_of(x_ND):  # Triton launches on the current device; autograd sets it in backward
        return FusedExperts.apply(x_ND, gate_NE, *tensors, weights.activation, weights.dropout)


class FusedExperts(torch.autograd.Function):
    """gate [N, E]: gate weight of each expert, 0 if not chosen. F = E * H: hidden columns of all experts, side by side.

    Saves pre and weighted [N, F] for backward. Forward writes weighted for its second product anyway, so keeping it for the gradient of
    down costs memory but no traffic; recomputing it from pre would cost backward another write of [N, F].
    """

    @staticmethod
    def forward(ctx, x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, activation, dropout):
        """Output [N, D]."""
        # on the device: no synchronisation, and a replayed CUDA graph draws a new seed
        seed = torch.randint(2**62, (), device=x_ND.device) if dropout > 0 else None
        pre_NF = x_ND @ up_EHD.flatten(0, 1).t()
        weighted_NF = torch.empty_like(pre_NF)
        _launch(_forward_kernel, pre_NF, bias_up_EH, gate_NE, weighted_NF, seed=seed, dropout=dropout, activation=activation)
        ctx.save_for_backward(x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, pre_NF, weighted_NF, seed)
        ctx.activation, ctx.dropout = activation, dropout
        return torch.addmm(gate_NE @ bias_down_ED, weighted_NF, down_EHD.flatten(0, 1))

    @staticmethod
    def backward(ctx, grad_ND):
        """Gradients of the inputs of `forward`."""
        if torch.is_grad_enabled():
            raise RuntimeError("the fused backend cannot be differentiated twice: use backend='reference'")
        x_ND, gate_NE, up_EHD, bias_up_EH, down_EHD, bias_down_ED, pre_NF, weighted_NF, seed = ctx.saved_tensors
        grad_NF = grad_ND @ down_EHD.flatten(0, 1).t()  # gradient of weighted; the kernel overwrites it with that of pre
        grad_gate = torch.empty_like(gate_NE, dtype=torch.float32)
        # bias gradients summed per tile: few rows, a fixed order, and no second read of grad_NF
        grad_bias_BF = grad_gate.new_empty(triton.cdiv(len(x_ND), BLOCK_N), grad_NF.shape[1])
        tensors = (pre_NF, bias_up_EH, gate_NE, grad_NF, grad_gate, grad_bias_BF)
        _launch(_backward_kernel, *tensors, seed=seed, dropout=ctx.dropout, activation=ctx.activation)
        grad_x, grad_up = grad_NF @ up_EHD.flatten(0, 1), (grad_NF.t() @ x_ND).view(up_EHD.shape)
        grad_bias_up = grad_bias_BF.sum(0).view(bias_up_EH.shape).to(x_ND.dtype)
        grad_down, grad_bias_down = (weighted_NF.t() @ grad_ND).view(down_EHD.shape), gate_NE.t() @ grad_ND
        grad_gate = grad_gate.add_(grad_ND @ bias_down_ED.t()).to(gate_NE.dtype)
        return grad_x, grad_gate, grad_up, grad_bias_up, grad_down, grad_bias_down, None, None


def _launch(kernel, pre_NF, bias_up_EH, gate_NE, *others: Tensor, seed: Tensor | None, dropout: float, activation: str) -> None:
    """Launch one program per expert and `BLOCK_N` tokens."""
    (N, E), H = gate_NE.shape, bias_up_EH.shape[1]
    block_H = min(MAX_BLOCK_H, max(4, triton.next_power_of_2(H)))
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    sizes = (seed, dropout, scale, N, E, H, activation, BLOCK_N, block_H)
    kernel[triton.cdiv(N, BLOCK_N), E](pre_NF, bias_up_EH, gate_NE, *others, *sizes, num_warps=WARPS)


@jit
def _activate(pre, ACTIVATION: tl.constexpr):
    """Hidden values and derivative; the compiler removes the derivative if it is unused."""
    if ACTIVATION == "relu":  # NaN stays NaN, as in torch
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
    """Tile of inverted dropout: 0 with probability p, else scale. row: index of token and expert in [N * E].

    Depends on seed, token, expert and column only, so that backward reproduces forward's mask. One call of the generator, about a hundred
    instructions, yields four numbers, used for four columns.
    """
    quad_Q = start // 4 + tl.arange(0, BLOCK_H // 4)
    a, b, c, d = tl.rand4x(tl.load(seed_ptr), row_N[:, None] * ((H + 3) // 4) + quad_Q[None, :])
    uniform = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_N, BLOCK_H))
    return tl.where(uniform < p, 0.0, scale)


@jit
def _load_pre(pre_ptr, bias_ptr, row_N, inside_N, start, expert, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Tile of pre + bias, its offsets in [N, F], its mask, and its columns within the expert."""
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
    """Overwrite grad of weighted with that of pre. A program covers all columns of its expert, so it can sum the gate's gradient."""
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
