"""Matryoshka MoE: a learned router, and k drawn for every layer by itself in every pass (Wang et al. 2025, arXiv 2509.26520, section 3).

k_l is uniform over k_min..k_max, independent between layers ("M-MoE-layer", the best of the paper's variants), so that the first experts of
a token learn to do with few others. A k for each step, the same in all layers, is the method "elastic" ("M-MoE-batch"); both work with
every router (--gate_name). Elastic MoE (Gu et al. 2025, arXiv 2509.21892) draws which experts are active together, too; that is not here.
Draws come from torch's default generator, those of process 0 in data parallelism. k_min is 1, as in the paper (--moe_top_k_min).
"""

from smoe_dropout.methods.base import LEARNED_ROUTER, Method, Objective, cross_entropy


def objective(model, forward, settings) -> Objective:
    """Cross-entropy of a pass in which every layer has a k of its own."""
    import torch

    from smoe_dropout.control import moe_layers, top_k
    from smoe_dropout.training import synchronized

    layers = [layer for _, layer in moe_layers(model)]
    device = next(model.parameters()).device
    drawn = synchronized(torch.randint(settings.k_min, settings.k_max + 1, (len(layers),), device=device)).tolist()
    with top_k(model, [min(k, layer.num_experts) for k, layer in zip(drawn, layers, strict=True)]):
        return cross_entropy(model, forward, settings)


METHOD = Method(
    name="matryoshka",
    title="Matryoshka MoE",
    source="arXiv 2509.26520",
    sparse=True,
    flags={**LEARNED_ROUTER, "dynamic_moe": True, "dynamic_moe_mode": "elastic", "moe_top_k_min": 1},
    objective=objective,
)
