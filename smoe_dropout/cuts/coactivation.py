"""Balanced clusters of neurons that are strong for the same tokens, so that what a token leaves out is weak for it.

Descent on what is lost: the sum over tokens of the strength of the neurons in experts that a token leaves out. Given what each leaves out,
the best balanced deal of the neurons is an assignment problem; given the deal, tokens leave out the experts that a linear router, fitted to
their strengths (`regression.Ridge`), ranks last. So the experts become such as a router can tell apart. The start is by k-means on which
tokens each neuron is among the strongest of, close to the co-activation graph split of MoEfication (arXiv 2110.01786, section 3.2).
"""

import torch
from torch import Tensor

from smoe_dropout.cuts import Neurons, balanced_clusters
from smoe_dropout.cuts.balance import balanced
from smoe_dropout.regression import Ridge, log_strength

NEEDS_DATA = True
STRONGEST, SEEN = 8, 3072  # start: one in so many neurons counts as strong, for so many tokens at most
KEPT = (7 / 8, 3 / 4, 1 / 2, 1 / 4)  # shares of the experts that are chosen, over which the loss is summed
POWER = 1.5  # of the strength: between 1, by which outputs that agree add up, and 2, by which those that do not
ROUNDS = 20


def order(neurons: Neurons, num_experts: int, draw: torch.Generator) -> Tensor:
    """A permutation [F] with the neurons of an expert side by side."""
    strength_TF, router = neurons.sample.strength_TF**POWER, Ridge(neurons.sample.inputs_TD)
    seen_TF = strength_TF[:SEEN]
    strong_TF = torch.zeros_like(seen_TF).scatter_(1, seen_TF.topk(-(-seen_TF.shape[1] // STRONGEST)).indices, 1.0)
    expert_F = balanced_clusters(strong_TF.t().contiguous(), num_experts, draw)
    for _ in range(ROUNDS):
        strength_TE = strength_TF.new_zeros(len(strength_TF), num_experts).index_add_(1, expert_F, strength_TF)
        ahead_TE = router.predicted(log_strength(strength_TE)).argsort(1, descending=True).argsort(1)  # how many experts are stronger
        left_TE = sum((ahead_TE >= max(1, round(share * num_experts))).to(strength_TF.dtype) for share in KEPT)
        before, expert_F = expert_F, balanced(strength_TF.t() @ left_TE)
        if torch.equal(before, expert_F):
            break
    return expert_F.argsort(stable=True)
