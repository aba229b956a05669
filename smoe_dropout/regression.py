"""Ridge regression of the strengths of experts, by which a linear router can choose those that matter for a token.

Shape suffixes: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor

PENALTY = 1e-2  # of the mean variance of the inputs
FLOOR = 1e-2  # of the mean strength, added, so that an expert that does nothing for a token has a logarithm


def log_strength(strength_TE: Tensor) -> Tensor:
    """Logarithm of the experts' strengths [T, E]: its softmax is each expert's share of the strength."""
    return (strength_TE + FLOOR * strength_TE.mean().clamp(min=1e-30)).log()


class Ridge:
    """Regression on inputs [T, D] with a constant, for any number of targets: the inputs are factorised once."""

    def __init__(self, inputs_TD: Tensor):
        self.mean_D = inputs_TD.mean(0)
        self.centred_TD = inputs_TD - self.mean_D
        square_DD = self.centred_TD.t() @ self.centred_TD
        square_DD.diagonal().add_(PENALTY * square_DD.diagonal().mean().clamp(min=1e-30))
        self.factor_DD = torch.linalg.cholesky(square_DD)

    def fit(self, targets_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [E, D] and bias [E] that predict the targets."""
        mean_E = targets_TE.mean(0)
        weight_DE = torch.cholesky_solve(self.centred_TD.t() @ (targets_TE - mean_E), self.factor_DD)
        return weight_DE.t(), mean_E - self.mean_D @ weight_DE

    def predicted(self, targets_TE: Tensor) -> Tensor:
        """Predictions of the targets [T, E] by such a map."""
        weight_ED, _ = self.fit(targets_TE)
        return targets_TE.mean(0) + self.centred_TD @ weight_ED.t()
