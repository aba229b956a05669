"""Peer implementations: in plain torch, written from public descriptions, and by their packages where installed. All are equal to
ours in outputs and gradients, those named "no biases" where ours are 0.

Shape suffixes as in smoe_dropout.experts (N tokens, K active experts, D, E, H, M = N * K) for the experts, and as in mem_transformer
(B lanes, T queries, K keys, H heads, C head width, D) for the attention.
"""

import copy
import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_transformer import MemTransformerLM, RelativeAttention
from smoe_dropout import MoELayer, moe_layers
from smoe_dropout.experts import Experts, ExpertWeights, fastmoe, grouped
from smoe_dropout.experts.activations import ACTIVATIONS

FASTMOE = "fastmoe's way"


def scatter_gemm_gather(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """fastmoe's way: tokens copied into expert order, each expert's two linear maps, results put back as [N, K, D], bmm with the gate."""
    (N, k), flat_M = indices_NK.shape, indices_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts = torch.bincount(flat_M, minlength=weights.up_EHD.shape[0]).tolist()
    x_MD = x_ND.index_select(0, order_M.div(k, rounding_mode="floor"))
    output_MD = torch.cat([_expert(x, *own, weights) for x, *own in zip(x_MD.split(counts), *_unbind(weights), strict=True)])
    output_NKD = output_MD.new_empty(output_MD.shape).index_copy_(0, order_M, output_MD).view(N, k, -1)
    return torch.bmm(weights_NK[:, None], output_NKD)[:, 0]


def boolean_masks(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """The loop found in most repositories: each expert processes the tokens selected by its mask, and weighted results are added."""
    y_ND = torch.zeros_like(x_ND)
    for expert, own in enumerate(zip(*_unbind(weights), strict=True)):
        token, slot = torch.where(indices_NK == expert)
        output = _expert(x_ND[token], *own, weights) * weights_NK[token, slot, None]
        y_ND.index_add_(0, token, output)
    return y_ND


def _unbind(weights: ExpertWeights) -> list[tuple[Tensor, ...]]:
    """Each expert's tensors. One unbind, because indexing expert by expert costs a gradient of the whole stack for each of them."""
    return [tensor.unbind(0) for tensor in weights[:4]]


def _expert(x: Tensor, up: Tensor, bias_up: Tensor, down: Tensor, bias_down: Tensor, weights: ExpertWeights) -> Tensor:
    hidden = F.dropout(ACTIVATIONS[weights.activation].apply(F.linear(x, up, bias_up)), weights.dropout)
    return torch.addmm(bias_down, hidden, down)


def _transformers_experts(weights: ExpertWeights, **other) -> SimpleNamespace:
    """The attributes that transformers' functions read from an experts module without a gate. Views: its matrices are [E, out, in]."""
    matrices = {"up_proj": weights.up_EHD, "down_proj": weights.down_EHD.transpose(1, 2)}
    return SimpleNamespace(num_experts=len(weights.up_EHD), act_fn=ACTIVATIONS[weights.activation].apply, **matrices, **other)


def transformers_eager(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """The library's loop over experts, as in its only model whose experts have two matrices (others have three)."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    experts = _transformers_experts(weights, config=SimpleNamespace(_experts_implementation="eager"))
    return NemotronHExperts.forward(experts, x_ND, indices_NK, weights_NK)


def transformers_grouped(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """The library's implementation with torch's grouped matrix product."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    settings = {"has_gate": False, "has_bias": True, "is_transposed": False, "has_post_expert_norm": False, "_is_expert_parallel": False}
    biases = {"up_proj_bias": weights.bias_up_EH, "down_proj_bias": weights.bias_down_ED}
    return grouped_mm_experts_forward(_transformers_experts(weights, **settings, **biases), x_ND, indices_NK, weights_NK)


def scattermoe(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Two Triton kernels that read and write tokens in place, without copying them into expert order."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    order = flatten_sort_count(indices_NK, len(weights.up_EHD))
    up_EDH = weights.up_EHD.transpose(1, 2)
    hidden = parallel_linear(x_ND, up_EDH, indices_NK.shape[1], *order, expert_biases=weights.bias_up_EH, grouped_out=True)
    hidden = F.dropout(ACTIVATIONS[weights.activation].apply(hidden), weights.dropout)
    return parallel_linear(hidden, weights.down_EHD, 1, *order, expert_biases=weights.bias_down_ED, gates=weights_NK, grouped_in=True)


def transformers_refusal(weights: ExpertWeights, device: str) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return "its experts have no dropout" if weights.dropout else None


def transformers_grouped_refusal(weights: ExpertWeights, device: str) -> str | None:
    return transformers_refusal(weights, device) or grouped.refusal(weights, device)


def scattermoe_refusal(weights: ExpertWeights, device: str) -> str | None:
    if importlib.util.find_spec("scattermoe") is None:
        return "scattermoe is not installed"
    return None if device == "cuda" else f"scattermoe needs CUDA tensors, and these are on {device!r}"


class Peer(NamedTuple):
    """A way to compute experts, from tokens [N, D], indices [N, K], gate weights [N, K] and the experts' weights.

    refusal: why it cannot run with these weights on this device, or None.
    """

    way: Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
    refusal: Callable[[ExpertWeights, str], str | None] = lambda weights, device: None
    biases: bool = True


EXPERT_PEERS = {
    FASTMOE: Peer(scatter_gemm_gather),
    "boolean masks": Peer(boolean_masks),
    "transformers, eager, no biases": Peer(transformers_eager, transformers_refusal, biases=False),
    "transformers, grouped_mm": Peer(transformers_grouped, transformers_grouped_refusal),
    "fastmoe": Peer(fastmoe.run, fastmoe.refusal),
    "scattermoe": Peer(scattermoe, scattermoe_refusal),
}


class PeerExperts(nn.Module):
    """Replaces `Experts`, with its parameters, by a peer's computation."""

    def __init__(self, experts: Experts, way: Callable[..., Tensor]):
        super().__init__()
        self.experts, self.way = experts, way

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, ragged: bool = False) -> Tensor:
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self.way(x_ND.to(dtype), indices_NK, weights_NK.to(dtype), self.experts.weights(dtype))


def with_peer(layer: MoELayer, name: str) -> MoELayer:
    """A copy of the layer whose experts are computed by a peer; biases it cannot add are 0 and frozen."""
    layer, peer = copy.deepcopy(layer), EXPERT_PEERS[name]
    if not peer.biases:
        for bias in (layer.experts.bias_up, layer.experts.bias_down):
            nn.init.zeros_(bias.requires_grad_(False))
    layer.experts = PeerExperts(layer.experts, peer.way)
    return layer


def dense_ffn(experts: Experts) -> nn.Sequential:
    """The dense feed-forward network with the concatenated weights of the experts, equal to the sum of all experts (gate weights 1)."""
    E, H, D = experts.up.shape
    ffn = nn.Sequential(nn.Linear(D, E * H), nn.ReLU(), nn.Dropout(experts.dropout), nn.Linear(E * H, D))
    values = experts.up.flatten(0, 1), experts.bias_up.flatten(), experts.down.flatten(0, 1).t(), experts.bias_down.sum(0)
    with torch.no_grad():
        for parameter, value in zip(ffn.parameters(), values, strict=True):
            parameter.copy_(value)
    return ffn


def rel_shift(term_TKBH: Tensor) -> Tensor:
    """Row i moved left by T - 1 - i: a column of zeros in front, the buffer read with rows and columns exchanged, the first row dropped."""
    T, K = term_TKBH.shape[:2]
    padded = torch.cat([term_TKBH.new_zeros(T, 1, *term_TKBH.shape[2:]), term_TKBH], 1)
    return padded.view(K + 1, T, *term_TKBH.shape[2:])[1:].view_as(term_TKBH)


class OfficialAttention(nn.Module):
    """The published Transformer-XL's way to compute `RelativeAttention`, with the same parameters: positions first, [T, K, B, H] scores by
    einsum, queries projected for the memory too and thrown away, a copy to shift, one to mask, softmax over dim 1.
    """

    def __init__(self, attention: RelativeAttention):
        super().__init__()
        self.n_head, self.d_head, self.dropatt = attention.n_head, attention.d_head, attention.dropatt
        self.qkv, self.position, self.out = attention.qkv, attention.position, attention.out

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor, position_KD: Tensor, bias_2H11C: Tensor, mask_TK: Tensor) -> Tensor:
        heads, (u_HC, v_HC) = (self.n_head, self.d_head), bias_2H11C[:, :, 0, 0]
        context_KBD = torch.cat([memory_BMD.transpose(0, 1), x_BTD.transpose(0, 1)])
        q, k, v = (part.unflatten(-1, heads) for part in F.linear(context_KBD, self.qkv.weight).chunk(3, -1))
        q = q[-x_BTD.shape[1] :]
        r = self.position(position_KD).unflatten(-1, heads)
        content = torch.einsum("tbhc,kbhc->tkbh", q + u_HC, k)
        distance = rel_shift(torch.einsum("tbhc,khc->tkbh", q + v_HC, r))
        scores = (content + distance).mul_(1 / math.sqrt(self.d_head))
        hidden_TK = mask_TK != 0
        if hidden_TK.any().item():
            scores = scores.float().masked_fill(hidden_TK[:, :, None, None], -math.inf).type_as(scores)
        p = F.dropout(scores.softmax(1), self.dropatt, self.training)
        y = torch.einsum("tkbh,kbhc->tbhc", p.to(v.dtype), v)
        return self.out(y.flatten(2)).transpose(0, 1)


def official_style(model: MemTransformerLM) -> MemTransformerLM:
    """A copy of the model whose attention is computed the published way and whose experts fastmoe's."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.attention = OfficialAttention(layer.attention)
    for _, moe in moe_layers(model):
        moe.experts = PeerExperts(moe.experts, scatter_gemm_gather)
    return model
