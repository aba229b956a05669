"""Routing by a hash of the token id (Roller et al. 2021, arXiv 2106.04426, "Hash Layers").

Expert e of token id t has the score mix(t E + e + seed), a 64-bit integer hash; the k largest scores choose, and weights are 1/k, as in
the official gate of arXiv 2303.01610. That gate hashes the position in the batch; this one hashes the token id.
"""

import torch
from torch import Tensor

from smoe_dropout.config import SMoEConfig
from smoe_dropout.routers import Router, Routing, evenly
from smoe_dropout.selection import Selection, largest


class HashRouter(Router):
    """Router that assigns a token id the same experts wherever it occurs. No parameters; `seed` is drawn per layer and saved."""

    needs = frozenset({"tokens"})
    uniform = True
    ragged = True

    def __init__(self, d_model: int, config: SMoEConfig):
        super().__init__(config)
        self.register_buffer("seed", torch.randint(2**62, ()))

    def forward(self, x_ND: Tensor, k: Selection) -> Routing:
        """x [N, D] -> its routing, by the token ids of the current batch. RuntimeError without token ids, or if their number is not N."""
        tokens_N = ids_of_tokens(self, x_ND)
        experts_E = torch.arange(self.num_experts, device=x_ND.device)
        scores_NE = mix(tokens_N[:, None] * self.num_experts + experts_E + self.seed)
        return evenly(scores_NE.topk(largest(k), dim=-1).indices, k)


def ids_of_tokens(router: Router, x_ND: Tensor) -> Tensor:
    """Token ids [N] of the layer's input. RuntimeError without token ids, or if their number is not N."""
    kind = type(router).__name__.removesuffix("Router")
    if router.shared is None or router.shared.tokens is None:
        raise RuntimeError(
            f"the {kind} router has no token ids, since the model's token embedding has not run in this pass: give the model token ids "
            "rather than embeddings, and use another router for a model with several embeddings"
        )
    tokens_N = router.shared.tokens.flatten()
    if len(tokens_N) != len(x_ND):
        raise RuntimeError(f"the {kind} router got {len(tokens_N)} token ids for {len(x_ND)} positions")
    return tokens_N


def mix(values: Tensor) -> Tensor:
    """64-bit integer hash: xor-shifts and wrapping multiplications with the constants of MurmurHash3's finaliser."""
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        values = (values ^ ((values >> 33) & 0x7FFFFFFF)) * factor
    return values ^ ((values >> 33) & 0x7FFFFFFF)
