"""Elastic k: SMoE-Dropout's frozen random router, with k drawn uniformly from k_min..k_max at every step instead of growing.

Every k used at inference is trained until the end. Prior art: slimmable networks (Yu and Huang 2019, arXiv 1903.05134) draw a width for
every step; Matryoshka MoE (Wang et al. 2025, arXiv 2509.26520) draws k for every batch, or for every layer (the method "matryoshka"), with
a learned router; Elastic MoE (Gu et al. 2025, arXiv 2509.21892) also draws which experts are active together. Here the router is frozen;
--gate_name and --freeze_gate select any other. Draws are a function of seed and step. k_min defaults to E/2 (--moe_top_k_min).
"""

from smoe_dropout.methods.base import FROZEN_ROUTER, Method

METHOD = Method(
    name="elastic",
    title="Elastic k",
    source="this repository; arXiv 1903.05134; arXiv 2509.26520",
    sparse=True,
    flags={**FROZEN_ROUTER, "dynamic_moe_mode": "elastic"},
)
