"""Experts with their hidden units in the order of another expert's, so that weights of like units can be averaged (MC-SMoE, arXiv
2310.01334, section 3.2).

The order of an expert's hidden units is arbitrary: any permutation computes the same function.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smoe_dropout.surgery.groups import Expert


def aligned(expert: Expert, to: Expert) -> Expert:
    """The same function, its hidden units in the order in which the sum of their inner products with those of `to` is largest."""
    products_HH = _units(to) @ _units(expert).T
    _, order_H = linear_sum_assignment(products_HH.cpu().numpy(), maximize=True)
    return permuted(expert, torch.as_tensor(order_H, device=expert.down_HD.device))


def permuted(expert: Expert, order_H: Tensor) -> Expert:
    """The same function with hidden unit `order_H[i]` in place i; a gate's row moves with the other row of its unit."""
    up, bias_up = (_by_unit(rows, len(order_H))[:, order_H].flatten(0, 1) for rows in (expert.up_HD, expert.bias_up_H))
    return expert._replace(up_HD=up, bias_up_H=bias_up, down_HD=expert.down_HD[order_H])


def _units(expert: Expert) -> Tensor:
    """All weights of every hidden unit [H, F]."""
    count = len(expert.down_HD)
    rows = [*_by_unit(expert.up_HD, count), _by_unit(expert.bias_up_H, count).T, expert.down_HD]
    return torch.cat([part.detach().double() for part in rows], 1)


def _by_unit(rows: Tensor, count: int) -> Tensor:
    """[H, ...] -> [1, H, ...], or of a gated expert [2H, ...] -> [2, H, ...]: the gates, and the others."""
    return rows.unflatten(0, (-1, count))
