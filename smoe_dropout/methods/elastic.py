"""Elastic k: SMoE-Dropout's frozen random router, and k drawn anew at every step, uniform over k_min..k_max, instead of growing.

Ours, after slimmable networks (Yu and Huang 2019, arXiv 1903.05134): every k that inference may use is also trained, to the end. Draws
are a function of seed and step. k_min is E/2 unless --moe_top_k_min says otherwise.
"""

from smoe_dropout.methods.base import FROZEN_ROUTER, Method

METHOD = Method(
    name="elastic",
    title="Elastic k",
    source="this repository; arXiv 1903.05134",
    sparse=True,
    flags={**FROZEN_ROUTER, "dynamic_moe_mode": "elastic"},
)
