"""SMoE: learned top-k router with constant k and the Switch load-balance loss.

Shazeer et al. 2017 (arXiv 1701.06538) and Fedus et al. 2021 (arXiv 2101.03961, eq. 4-6); the paper's main baseline, at k = E/2 and k = E.
"""

from smoe_dropout.methods.base import LEARNED_ROUTER, Method

METHOD = Method(
    name="smoe",
    title="SMoE (learned router)",
    source="arXiv 1701.06538; arXiv 2101.03961",
    sparse=True,
    flags=LEARNED_ROUTER,
    baseline=True,
)
