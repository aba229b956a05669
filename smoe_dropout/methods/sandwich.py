"""Elastic k by the sandwich rule: each step trains the largest k, the smallest, and one drawn in between.

Yu and Huang 2019 (arXiv 1903.05134, sections 3.1 and 3.2), there for widths: the largest learns from the labels, the others from the
largest, loss = (CE_max + KL(p_max || p_min) + KL(p_max || p_drawn)) / 3 with p_max detached. Same frozen random router as SMoE-Dropout;
three passes per step.
"""

from smoe_dropout.methods.base import FROZEN_ROUTER, Method, Objective, with_auxiliary


def objective(model, forward, settings) -> Objective:
    """Mean of the three losses; `nll` and the carried state are those of the largest k."""
    from smoe_dropout.control import get_top_k, top_k

    drawn = get_top_k(model)  # set by the schedule
    with top_k(model, settings.k_max):
        largest = forward()
    nll = largest.token_losses.mean()
    total = with_auxiliary(model, nll)
    teacher = largest.logits.detach().log_softmax(-1)
    for k in (settings.k_min, drawn):
        with top_k(model, k):
            student = forward().logits.log_softmax(-1)
        total = with_auxiliary(model, total + (teacher.exp() * (teacher - student)).sum(-1).mean())
    return Objective(total / 3, nll, largest.state)


METHOD = Method(
    name="sandwich",
    title="Elastic k, sandwich",
    source="this repository; arXiv 1903.05134",
    sparse=True,
    flags={**FROZEN_ROUTER, "dynamic_moe_mode": "elastic"},
    objective=objective,
    reads_logits=True,
)
