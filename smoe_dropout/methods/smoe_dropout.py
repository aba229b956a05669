"""SMoE-Dropout: randomly initialised, frozen router, and k growing linearly from E/2 to E over training.

Chen et al. 2023 (arXiv 2303.01610, section 3): h(x) = W x + b is drawn once; the top-k logits choose, their softmax weighs;
k(t) = clip(round((k_max - k_min) t / T) + k_min, k_min, k_max).
"""

from smoe_dropout.methods.base import FROZEN_ROUTER, Method

METHOD = Method(
    name="smoe_dropout",
    title="SMoE-Dropout",
    source="arXiv 2303.01610, section 3",
    sparse=True,
    flags={**FROZEN_ROUTER, "dynamic_moe_mode": "linear_increase"},
    baseline=True,
)
