"""Alignment of experts' hidden units, so that weights of similar units can be averaged (MC-SMoE, arXiv 2310.01334, section 3.2).

The order of an expert's hidden units is arbitrary: any permutation computes the same function.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smoe_dropout.surgery.groups import Expert


def aligned(expert: Expert, to: Expert) -> Expert:
    """The expert with hidden units permuted to maximise the sum of inner products with those of `to`. Computes the same function."""
    products_HH = _units(to) @ _units(expert).T
    _, order_H = linear_sum_assignment(products_HH.cpu().numpy(), maximize=True)
    return permuted(expert, torch.as_tensor(order_H, device=expert.down_HD.device))


def permuted(expert: Expert, order_H: Tensor) -> Expert:
    """The expert with hidden unit `order_H[i]` at position i; a gate's row moves with its unit. Computes the same function."""
    up, bias_up = (_by_unit(rows, len(order_H))[:, order_H].flatten(0, 1) for rows in (expert.up_HD, expert.bias_up_H))
    return expert._replace(up_HD=up, bias_up_H=bias_up, down_HD=expert.down_HD[order_H])


def _units(expert: Expert) -> Tensor:
    """All weights of each hidden unit, concatenated [H, F]."""
    count = len(expert.down_HD)
    rows = [*_by_unit(expert.up_HD, count), _by_unit(expert.bias_up_H, count).T, expert.down_HD]
    return torch.cat([part.detach().double() for part in rows], 1)


def _by_unit(rows: Tensor, count: int) -> Tensor:
    """[H, ...] -> [1, H, ...]; for a gated expert [2H, ...] -> [2, H, ...], the gate's rows first."""
    return rows.unflatten(0, (-1, count))
