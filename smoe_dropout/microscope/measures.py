"""Measures of routing, of experts' outputs, and of predictions, from counts and sums that a text adds up.

Shape suffixes: N tokens, K active experts, E experts, S sampled tokens, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15  # of the calibration error, as in arXiv 1706.04599
CHUNK = 4096  # tokens whose predictions or routes are compared at a time
TINY = 1e-30


def load_entropy(load_E: Tensor) -> float:
    """Entropy of the experts' fractions of the assignments, divided by its maximum log E: 1 is even use. 1 for a single expert."""
    if len(load_E) == 1:
        return 1.0
    return torch.special.entr(load_E.double()).sum().item() / math.log(len(load_E))


def load_variation(load_E: Tensor) -> float:
    """Coefficient of variation, standard deviation over mean (arXiv 1701.06538, section 4, before it is squared): 0 is even use."""
    return (load_E.double().std(correction=0) / load_E.double().mean().clamp(min=TINY)).item()


def co_activation(counts_EE: Tensor) -> Tensor:
    """N_ij / N_i [E, E]: of the tokens with expert i, the fraction that has j, too (OLMoE, arXiv 2409.02060, section 5.2); diagonal 1.

    counts: of tokens that have both experts. Rows of experts without tokens are 0.
    """
    return counts_EE / counts_EE.diagonal()[:, None].clamp(min=1)


def first_choice(routes_NK: Tensor) -> Tensor:
    """The first expert of each token in the router's order [N], -1 for none. Places without an expert are -1."""
    return routes_NK.gather(1, (routes_NK >= 0).int().argmax(1, keepdim=True))[:, 0]


def fluctuation(routes_NK: Tensor, later_NK: Tensor) -> float:
    """Fraction of tokens whose first expert differs between two checkpoints (arXiv 2505.00792)."""
    return (first_choice(routes_NK) != first_choice(later_NK)).double().mean().item()


def saturation(routes_NK: Tensor, final_NK: Tensor) -> float:
    """Mean fraction of a token's experts at the last checkpoint that it had at an earlier one (OLMoE, arXiv 2409.02060, section 5.1).

    Tokens without experts at the last checkpoint do not count.
    """
    kept, tokens = 0.0, 0
    for one_NK, last_NK in zip(routes_NK.split(CHUNK), final_NK.split(CHUNK), strict=True):
        same_NK = ((last_NK[:, :, None] == one_NK[:, None, :]) & (last_NK >= 0)[:, :, None]).any(-1)
        chosen_N = (last_NK >= 0).sum(1)
        kept += (same_NK.sum(1)[chosen_N > 0] / chosen_N[chosen_N > 0].double()).sum().item()
        tokens += int((chosen_N > 0).sum())
    return kept / max(tokens, 1)


def cosines(outputs_SED: Tensor) -> Tensor:
    """Sum over tokens of the cosine between the outputs of each two experts [E, E]; 0 where an output is zero."""
    unit_ESD = torch.nn.functional.normalize(outputs_SED, dim=-1, eps=TINY).transpose(0, 1).flatten(1)
    return (unit_ESD @ unit_ESD.t()).double()


def dependence(outputs_SED: Tensor) -> Tensor:
    """Unbiased linear HSIC of the outputs of each two experts on a batch of tokens [E, E] (HSIC_1 of Song et al. 2012, JMLR 13; S >= 4).

    The inner product of both experts' centred S x S Gram matrices without diagonals, over S (S - 3).
    """
    S, outputs_ESD = len(outputs_SED), outputs_SED.transpose(0, 1)
    gram_ESS = outputs_ESD @ outputs_ESD.transpose(1, 2)
    gram_ESS.diagonal(dim1=1, dim2=2).zero_()
    rows_ES = gram_ESS.sum(2) / (S - 2)
    gram_ESS += (rows_ES.sum(1) / (S - 1))[:, None, None] - rows_ES[:, :, None] - rows_ES[:, None, :]
    gram_ESS.diagonal(dim1=1, dim2=2).zero_()
    flat_EM = gram_ESS.flatten(1)
    return (flat_EM @ flat_EM.t()).double() / (S * (S - 3))


def alignment(dependence_EE: Tensor) -> Tensor:
    """Linear CKA of each two experts [E, E] from their HSIC, added up over batches of tokens (arXiv 1905.00414; 2010.15327, section 3)."""
    own_E = dependence_EE.diagonal().clamp(min=0).sqrt()
    return dependence_EE / (own_E[:, None] * own_E).clamp(min=TINY)


def effective_rank(gram_EE: Tensor) -> float:
    """exp of the entropy of the normalised singular values of a matrix with a row per expert (Roy and Vetterli 2007), from 1 to E.

    gram: inner products of the rows. 0 if all are zero.
    """
    values_E = torch.linalg.eigvalsh(gram_EE.double()).clamp(min=0).sqrt()
    return torch.special.entr(values_E / values_E.sum()).sum().exp().item() if values_E.any() else 0.0


def mean_of_pairs(values_EE: Tensor) -> float | None:
    """Mean of the values of two different experts; None for a single one."""
    E = len(values_EE)
    return None if E < 2 else ((values_EE.sum() - values_EE.diagonal().sum()) / (E * (E - 1))).item()


class Predictions:
    """Loss, accuracy and calibration error of predictions, added up.

    The expected calibration error is sum_b n_b / n |accuracy_b - confidence_b| over equal bins of the largest probability (Guo et al. 2017,
    arXiv 1706.04599, eq. 3).
    """

    def __init__(self) -> None:
        self.loss, self.weight = 0.0, 0
        self.bins_3B = torch.zeros(3, BINS, dtype=torch.float64)  # predictions, correct ones, confidence

    def add_loss(self, loss: float, weight: int) -> None:
        """Add a mean loss over this many positions."""
        self.loss, self.weight = self.loss + loss * weight, self.weight + weight

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits [..., V] for targets [...]; those of -100 do not count."""
        logits_NV, targets_N = logits.flatten(0, -2), targets.flatten()
        for some_NV, some_N in zip(logits_NV.split(CHUNK), targets_N.split(CHUNK), strict=True):
            real_N = some_N != -100
            log_NV, some_N = some_NV[real_N].float().log_softmax(-1), some_N[real_N]
            self.add_loss(-log_NV.gather(1, some_N[:, None]).double().mean().item() if len(some_N) else 0.0, len(some_N))
            largest_N, guess_N = log_NV.max(-1)
            sure_N = largest_N.exp().double().cpu()
            place_N = ((sure_N * BINS).ceil().long() - 1).clamp(0, BINS - 1)
            for row, values_N in enumerate((torch.ones_like(sure_N), (guess_N == some_N).double().cpu(), sure_N)):
                self.bins_3B[row].index_add_(0, place_N, values_N)

    def result(self) -> tuple[float | None, float | None, float | None]:
        """Mean loss, accuracy and calibration error; None for what the passes did not return."""
        count_B, correct_B, sure_B = self.bins_3B
        count = count_B.sum().item()
        loss = self.loss / self.weight if self.weight else None
        return (loss, correct_B.sum().item() / count, ((correct_B - sure_B).abs().sum() / count).item()) if count else (loss, None, None)
