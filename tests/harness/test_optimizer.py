"""The learning rate by step against formulas, torch's schedulers and the official code; the plateau; the optimisers."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from utils.flags.fields import Flags
from utils.training.optimizer import Plateau, build_optimizer, learning_rate


def flags(**changes) -> Flags:
    return dataclasses.replace(Flags(lr=0.1, max_step=50), **changes)


def official_rates(scheduler: str, lr: float, warmup: int, max_step: int) -> list[float]:
    """The rate of each update in train.py at 0272cea, lines 404-431 and 559-572; there the first update of a warm-up has the whole rate,
    and later ones are one step behind ours."""
    rates, rate = [], lr
    if scheduler == "inv_sqrt":
        rate = lr * (1.0 if warmup == 0 else 0.0)
    for step in range(1, max_step + 1):
        rates.append(rate)
        if scheduler == "inv_sqrt":
            rate = lr * (1 / math.sqrt(step) if step > warmup else step / warmup**1.5)
        elif step < warmup:
            rate = lr * step / warmup
        elif scheduler == "cosine":
            rate = lr * (1 + math.cos(math.pi * step / max_step)) / 2
        else:
            rate = lr
    return rates


def test_cosine_is_torchs_cosine_annealing():
    run = flags(eta_min=0.01)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=run.max_step, eta_min=run.eta_min)
    for step in range(run.max_step + 1):
        assert learning_rate(run, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert learning_rate(run, run.max_step) == pytest.approx(0.01) == learning_rate(run, 10 * run.max_step)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "inv_sqrt"])
def test_without_warm_up_rates_are_the_official_ones(scheduler):
    run = flags(scheduler=scheduler)
    assert [learning_rate(run, step) for step in range(50)] == pytest.approx(official_rates(scheduler, 0.1, 0, 50), rel=1e-9)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "dev_perf"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(scheduler):
    run = flags(scheduler=scheduler, warmup_step=10)
    rates = [learning_rate(run, step) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) / 10 for step in range(10)])
    rest = flags(scheduler=scheduler)
    assert rates[10:] == [learning_rate(rest, step) for step in range(10, 50)]
    assert max(b / a for a, b in pairwise(rates[10:])) <= 1


def test_inv_sqrt_continues_from_the_end_of_warm_up():
    """Official: step / warmup^1.5 up to the warm-up's end, then 1 / sqrt(step); the two meet at 1 / sqrt(warmup)."""
    run = flags(scheduler="inv_sqrt", warmup_step=16)
    rates = [learning_rate(run, step) for step in range(50)]
    assert rates[17:] == pytest.approx(official_rates("inv_sqrt", 0.1, 16, 50)[17:], rel=1e-9)
    steps = [b / a for a, b in pairwise(rates)]
    assert min(steps) > 0.9, f"the rate falls from {rates[15]} to {rates[16]} in one step"


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_is_torchs_reduce_on_plateau(patience):
    run = flags(scheduler="dev_perf", patience=patience, decay_rate=0.3, lr_min=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.lr)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=patience, min_lr=1e-3, threshold=0.0, eps=0.0)
    ours = Plateau(run)
    for value in [3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.4, 1.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]:
        again = Plateau(run)
        again.load_state_dict(ours.state_dict())  # a resumed run decides the same
        for plateau in (ours, again):
            plateau.observe(value)
        theirs.step(value)
        assert ours.state_dict() == again.state_dict()
        assert learning_rate(run, 40, ours.factor) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_optimisers_hold_the_trained_parameters_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    for name, kind in (("adam", torch.optim.Adam), ("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad)):
        optimizer = build_optimizer(model, flags(optim=name, mom=0.9))
        assert type(optimizer) is kind and optimizer.param_groups[0]["params"] == list(model[1].parameters())
        assert optimizer.param_groups[0].get("momentum", 0.9) == 0.9 and optimizer.param_groups[0]["lr"] == 0.1


def test_an_unrouted_expert_is_still_moved_by_adam():
    """Its gradient is zero, not None; the official kernels do the same."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), flags())
    for gradient in (1.0, 0.0):
        before = weight.item()
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        assert weight.item() < before
