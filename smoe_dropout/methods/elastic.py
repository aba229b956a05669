"""Elastic k: SMoE-Dropout's frozen random router, with k drawn uniformly from k_min..k_max at every step instead of growing.

Original to this repository, inspired by slimmable networks (Yu and Huang 2019, arXiv 1903.05134): every k used at inference is trained
until the end. Draws are a function of seed and step. k_min defaults to E/2 (--moe_top_k_min).
"""

from smoe_dropout.methods.base import FROZEN_ROUTER, Method

METHOD = Method(
    name="elastic",
    title="Elastic k",
    source="this repository; arXiv 1903.05134",
    sparse=True,
    flags={**FROZEN_ROUTER, "dynamic_moe_mode": "elastic"},
)
