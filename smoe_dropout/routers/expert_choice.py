"""Expert choice: every expert takes the tokens that want it most (Zhou et al. 2022, arXiv 2202.09368, section 3).

S = softmax(W x) over the experts; in training expert e takes the c = round(N k / E) of the pass's N tokens with the largest S_e (eq. 1),
with weight S_e. The load is even, and a token has k experts on average, perhaps none. Whether a token has an expert depends on all tokens
of the batch, later ones included: in a causal model the training loss sees a little of the future, and no text can be written in this way.
So in evaluation each token takes its k largest S, which depends on it alone.
"""

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.routers import LinearRouter, Routing
from smoe_dropout.selection import Selection


class ExpertChoiceRouter(LinearRouter):
    """Router by expert choice in training, by token choice in evaluation."""

    uses = ()
    variable = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(d_model, config)
        self.gate_weight, self.bias = "pre_softmax", None

    @property
    def ragged(self) -> bool:
        """Return whether it takes a k for each token: in evaluation."""
        return not self.training

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to k experts per token, on average in training mode."""
        if not self.training:
            return super().choose(logits_NE, k)
        self.show(logits_NE)
        N, E = logits_NE.shape
        scores_NE = logits_NE.softmax(-1)
        taken_CE = scores_NE.topk(min(N, max(1, round(N * k / E))), dim=0).indices if N else logits_NE.new_zeros(0, E, dtype=torch.int64)
        mask_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter(0, taken_CE, True)
        weights_NE, indices_NE = (scores_NE * mask_NE).sort(-1, descending=True)
        return Routing(indices_NE.masked_fill(~mask_NE.gather(1, indices_NE), -1), weights_NE, {}, True)
