"""Attention-aware routing: router scores are averaged over tokens as the preceding attention layer averages values (arXiv 2505.00792).

e_j = W u_j + b; e'_i = sum_j A_ij e_j, with A the preceding attention's head of lowest mean entropy; then top-k of e'. Here A is restricted
to positions of the same segment and renormalised, since memory has no router scores. With causal attention the head is selected per
position by the mean entropy up to that position, so that no route depends on later tokens; otherwise by the mean over all positions. A is
detached, so routing does not train attention.
"""

import torch
from torch import Tensor

from smoe_dropout.hosts.attention import is_causal
from smoe_dropout.layer import MoELayer
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.routers import Routing


class AttentionLayer(MoELayer):
    """MoE layer for inputs [B, T, D] whose preceding attention keeps probabilities [B, heads, T, keys], this segment's keys last."""

    needs = frozenset({"attention", "probabilities"})

    def route(self, x: Tensor) -> Routing:
        """x [B, T, D] -> the routing of its B * T tokens."""
        logits_BTE = self.router.logits(x)
        with torch.autocast(x.device.type, enabled=False):
            mixed_BTE = segment_attention(self.attention.probabilities, logits_BTE.dtype, is_causal(self.attention)) @ logits_BTE
        return self.router.choose(mixed_BTE.flatten(0, 1), self.selection(x))

    def routing_flops(self, lanes: int, positions: int) -> int:
        """FLOPs of the router and of averaging its scores."""
        return super().routing_flops(lanes, positions) + 2 * lanes * positions**2 * self.num_experts


def segment_attention(probabilities_BHTK: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """Attention of the head of lowest mean entropy among this segment's positions [B, T, T]; rows sum to 1."""
    p_BHTK = probabilities_BHTK.to(dtype)
    T = p_BHTK.shape[2]
    entropy_BHT = torch.special.entr(p_BHTK).sum(-1)
    # sums rather than means: the number of positions is the same for all heads
    summed_BHT = entropy_BHT.cumsum(-1) if causal else entropy_BHT.sum(-1, keepdim=True).expand_as(entropy_BHT)
    head_BT = summed_BHT.argmin(1)
    chosen_BTT = p_BHTK[..., -T:].gather(1, head_BT[:, None, :, None].expand(-1, 1, -1, T))[:, 0]
    own = torch.eye(T, dtype=dtype, device=p_BHTK.device) * torch.finfo(dtype).tiny  # if all attention is on memory, use the token itself
    chosen_BTT = chosen_BTT + own
    return chosen_BTT / chosen_BTT.sum(-1, keepdim=True)


METHOD = Method(
    name="attention",
    title="Attention-aware SMoE",
    source="arXiv 2505.00792",
    sparse=True,
    flags=LEARNED_ROUTER,
    layer=AttentionLayer,
    routers=("learned", "random"),
)
