"""Floating-point operations and parameters by formula: two operations a multiply-add, matrix products only."""

from __future__ import annotations

import re

from torch import nn

from smoe_dropout import moe_layers
from smoe_dropout.attention import ExpertQueryKeyValue
from smoe_dropout.experts.compressed import CompressedExperts
from smoe_dropout.layer import MoELayer
from utils.models.registry import Shape, architecture

# modules that make up the feed-forward layers: of Transformer-XL; of BERT and RoBERTa; of most decoders
FEED_FORWARD = re.compile(r"(.*\.)?(feed_forward|layer\.\d+\.(intermediate|output\.dense)|(layers|h)\.\d+\.mlp)")


def forward_flops(name: str, model: nn.Module, shape: Shape, k: int | None) -> int:
    """Operations of one forward pass of the architecture `name`; a small head for fine-tuning is not counted."""
    if hasattr(model, "backbone"):
        model, shape = model.backbone, Shape(shape.rows * shape.sequences, shape.positions // shape.sequences, targets=0)
    return architecture(name).forward_flops(model, shape, k)


def expert_flops(model: nn.Module, shape: Shape, k: int | None, layers: int, dense: int) -> int:
    """Operations of the feed-forward networks of `layers` layers in one pass; `dense`: those of one token in a dense layer."""
    sparse, tokens = moe_layers(model), shape.rows * shape.positions
    total = max(0, layers - len(sparse)) * tokens * dense
    for _, layer in sparse:
        one = layer.experts.up[0].numel() + layer.experts.down[0].numel()
        active = active_experts(layer, k) if k else layer.computed_experts
        total += 2 * tokens * one * active + layer.routing_flops(shape.rows, shape.positions)
        if isinstance(experts := layer.experts, CompressedExperts):  # composes the weights from their factors, once a pass
            total += 2 * (experts.up_u.numel() * experts.up_v.shape[-1] + experts.down_u.numel() * experts.down_v.shape[-1])
    return total


def active_experts(layer: MoELayer, k: int) -> int:
    """Experts per token of a layer at k; where tokens differ, the rounded mean of its last pass, if it has run."""
    return max(1, round(layer.mean_k())) if layer.variable and layer.uses else min(k, layer.num_experts)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of all parameters but those pruned, of the trainable ones, and of those of routers; a tied tensor counts once."""
    routers = [parameter for _, layer in moe_layers(model) for parameter in layer.routing_parameters()]
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()) - sum(pruned(layer) for _, layer in moe_layers(model)),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "router": sum(parameter.numel() for parameter in routers),
    }


def pruned(layer: MoELayer) -> int:
    """Weights of S in compressed experts that are 0, as the code of MC-SMoE counts them."""
    experts = layer.experts
    return sum(int((rows == 0).sum()) for rows in (experts.up_s, experts.down_s)) if isinstance(experts, CompressedExperts) else 0


def active_parameters(model: nn.Module, k: int | None) -> tuple[int, int]:
    """Parameters used for one token with k experts active: in the whole model, and in its feed-forward layers."""
    layers = moe_layers(model)
    total, ffn_total, idle = parameter_counts(model)["total"], -sum(pruned(layer) for _, layer in layers), 0
    for name, module in model.named_modules():
        if FEED_FORWARD.fullmatch(name):
            ffn_total += sum(parameter.numel() for parameter in module.parameters())
    for _, layer in layers:
        one = (sum(parameter.numel() for parameter in layer.experts.parameters()) - pruned(layer)) // layer.num_experts
        idle += (layer.num_experts - active_experts(layer, k or layer.top_k)) * one
    elsewhere = 0  # attention experts, of which one is active
    for module in model.modules():
        if isinstance(module, ExpertQueryKeyValue):
            elsewhere += sum((len(tensor) - 1) * tensor[0].numel() for tensor in (module.weight, module.bias))
    return total - idle - elsewhere, ffn_total - idle
