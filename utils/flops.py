"""Floating-point operations and parameters of the Transformer-XL, by formula: two operations a multiply-add, matrix products only."""

from torch import nn

from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout import moe_layers
from smoe_dropout.attention import ExpertQueryKeyValue


def forward_flops(model: MemTransformerLM, batch: int, segment: int, memory: int, k: int | None) -> int:
    """Of one forward pass over `batch` lanes of `segment` positions with so many positions of memory, k experts active (None: as many as
    the layers compute at present; a dense model has none).
    """
    c: TransformerXLConfig = model.config
    queries, keys, width = batch * segment, batch * (segment + memory), c.n_head * c.d_head
    projections = 2 * c.d_model * width * (2 * queries + 2 * keys + segment + memory)  # q and out; k and v; positions, shared by lanes
    scores = 2 * width * queries * (3 * (segment + memory) + 1)  # content, position (with the column that shifts it), values
    total = c.n_layer * (projections + scores) + 2 * queries * c.d_model * c.n_token
    sparse = moe_layers(model)
    for _, layer in sparse:
        one = layer.experts.up[0].numel() + layer.experts.down[0].numel()
        total += 2 * queries * one * (k or layer.computed_experts) + layer.routing_flops(batch, segment)
    for module in model.modules():
        if isinstance(module, ExpertQueryKeyValue):
            total += 2 * keys * module.router.weight.numel()
    return total + (c.n_layer - len(sparse)) * 4 * queries * c.d_model * c.d_inner


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """All parameters, those that are trained, and those of routers; a tied tensor counts once."""
    routers = [parameter for _, layer in moe_layers(model) for parameter in layer.routing_parameters()]
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "router": sum(parameter.numel() for parameter in routers),
    }


def active_parameters(model: nn.Module, k: int | None) -> tuple[int, int]:
    """Parameters that one token meets with k experts active: of the whole model, and of its feed-forward layers."""
    total, ffn_total, idle = parameter_counts(model)["total"], 0, 0
    for name, module in model.named_modules():
        if name.endswith("feed_forward"):
            ffn_total += sum(parameter.numel() for parameter in module.parameters())
    for _, layer in moe_layers(model):
        one = sum(parameter.numel() for parameter in layer.experts.parameters()) // layer.num_experts
        idle += (layer.num_experts - (k or layer.top_k)) * one
    elsewhere = 0  # experts outside the feed-forward layers, of which one is active
    for module in model.modules():
        if isinstance(module, ExpertQueryKeyValue):
            elsewhere += sum((len(tensor) - 1) * tensor[0].numel() for tensor in (module.weight, module.bias))
    return total - idle - elsewhere, ffn_total - idle
