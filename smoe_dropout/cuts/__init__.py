"""Cuts: the order in which the hidden neurons of a trained FFN are dealt to experts, H = F/E neurons to each.

A cut is a module of this package with
    NEEDS_DATA: bool                                          whether it requires `Neurons.sample`
    order(neurons, num_experts, draw) -> order_F              a permutation of the neurons; expert e gets those at e H .. (e + 1) H - 1
To add one, write a file and add a line to `registry.CUTS`. Shape suffixes: F neurons, T tokens, D model width, E experts, P features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smoe_dropout.cuts.balance import balanced
from smoe_dropout.registry import CUTS, load

ROUNDS = 15  # of k-means, which hardly improves after ten


class Sample(NamedTuple):
    """Calibration tokens of one FFN: inputs [T, D], and the strength of each neuron [T, F], |h_j(x)| * ||down_j||."""

    inputs_TD: Tensor
    strength_TF: Tensor


class Neurons(NamedTuple):
    """The neurons of one FFN: their rows in the first map [F, D], the gate's if it is gated, and their importance [F]."""

    rows_FD: Tensor
    importance_F: Tensor
    sample: Sample | None = None

    def __getitem__(self, chosen_F: Tensor) -> Neurons:
        sample = self.sample and self.sample._replace(strength_TF=self.sample.strength_TF[:, chosen_F])
        return Neurons(self.rows_FD[chosen_F], self.importance_F[chosen_F], sample)


@torch.no_grad()
def arranged(cut: str, neurons: Neurons, num_experts: int, shared_experts: int, draw: torch.Generator) -> Tensor:
    """Permutation [F] of an FFN's neurons: the most important ones for the shared experts, the others as the cut says."""
    H = len(neurons.rows_FD) // num_experts
    by_importance_F = neurons.importance_F.sort(descending=True, stable=True).indices
    shared, rest = (part.sort().values for part in by_importance_F.tensor_split([shared_experts * H])) if shared_experts else (None, None)
    if shared is None:
        return load(CUTS, "cut", cut).order(neurons, num_experts, draw)
    return torch.cat([shared, rest[load(CUTS, "cut", cut).order(neurons[rest], num_experts - shared_experts, draw)]])


def balanced_clusters(points_FP: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Cluster [F] of each point by k-means with clusters of equal size (MoEfication, arXiv 2110.01786, section 3.2)."""
    start = torch.randperm(len(points_FP), generator=draw)[:count].to(points_FP.device)
    centres_CP, cluster_F = points_FP[start], None
    for _ in range(ROUNDS):
        cost_FC = centres_CP.square().sum(1) - 2 * points_FP @ centres_CP.t()
        before, cluster_F = cluster_F, balanced(cost_FC)
        if before is not None and torch.equal(before, cluster_F):
            break
        centres_CP = torch.zeros_like(centres_CP).index_add_(0, cluster_F, points_FP) * (count / len(points_FP))
    return cluster_F
