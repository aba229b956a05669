"""Attention-aware routing: router scores are averaged over tokens as the preceding attention layer averages values (arXiv 2505.00792).

e_j = W u_j + b; e'_i = sum_j A_ij e_j, with A the preceding attention's head of lowest mean entropy; then top-k of e'. Here A is restricted
to positions of the same segment and renormalised, since memory has no router scores; a cache of transformers has those of its positions,
which count as the same segment, and a Transformer-XL may read a segment in several calls. With causal attention the head is selected per
position by the mean entropy up to that position, so that no route depends on later tokens; otherwise by the mean over all positions. A is
detached, so routing does not train attention.
"""

import torch
from torch import Tensor

from smoe_dropout.hosts.attention import is_causal, probabilities_before, with_past
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.routers import Routing


class AttentionLayer(MoELayer):
    """MoE layer for inputs [B, T, D] whose preceding attention keeps probabilities [B, heads, T, keys], this segment's keys last."""

    needs = frozenset({"attention", "probabilities"})

    def route(self, x: Tensor) -> Routing:
        """x [B, T, D] -> the routing of its B * T tokens."""
        logits_BTE, causal = self.router.logits(x), is_causal(self.attention)
        with torch.autocast(x.device.type, enabled=False):
            p_BHTK = probabilities_before(self).to(logits_BTE.dtype)
            entropy_BHT = torch.special.entr(p_BHTK).sum(-1)
            logits_BSE, entropy_BSH = with_past(self, logits_BTE, entropy_BHT.transpose(1, 2))
            mixed_BTE = segment_attention(p_BHTK, entropy_BSH.transpose(1, 2), causal) @ logits_BSE[:, -p_BHTK.shape[3] :]
        return self.router.choose(mixed_BTE.flatten(0, 1), self.selection(x))

    def routing_flops(self, lanes: int, positions: int) -> int:
        """FLOPs of the router and of averaging its scores."""
        return super().routing_flops(lanes, positions) + 2 * lanes * positions**2 * self.num_experts


def segment_attention(p_BHTK: Tensor, entropy_BHS: Tensor, causal: bool) -> Tensor:
    """Attention of the head of lowest mean entropy among the last positions of the segment [B, T, min(S, K)]; rows sum to 1.

    p: probabilities, those of the segment last. entropy: of all S positions of the segment.
    """
    T, last = p_BHTK.shape[2], min(entropy_BHS.shape[2], p_BHTK.shape[3])
    # sums rather than means: the number of positions is the same for all heads
    summed_BHS = entropy_BHS.cumsum(-1) if causal else entropy_BHS.sum(-1, keepdim=True).expand_as(entropy_BHS)
    head_BT = summed_BHS[..., -T:].argmin(1)
    chosen_BTL = p_BHTK[..., -last:].gather(1, head_BT[:, None, :, None].expand(-1, 1, -1, last))[:, 0]
    # if all attention is on memory, use the token itself
    own_TL = torch.ones(T, last, dtype=p_BHTK.dtype, device=p_BHTK.device).triu(last - T).tril(last - T) * torch.finfo(p_BHTK.dtype).tiny
    chosen_BTL = chosen_BTL + own_TL
    return chosen_BTL / chosen_BTL.sum(-1, keepdim=True)


METHOD = Method(
    name="attention",
    title="Attention-aware SMoE",
    source="arXiv 2505.00792",
    sparse=True,
    flags=LEARNED_ROUTER,
    layer=AttentionLayer,
    routers=("learned", "random"),
)
