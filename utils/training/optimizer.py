"""Optimiser and learning rate. The rate is a function of the step, so a resumed run needs no scheduler state, except for dev_perf."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from smoe_dropout import parameter_groups
from utils.flags.fields import Flags


def build_optimizer(model: nn.Module, flags: Flags) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters, in the model's order."""
    parameters: Iterable[nn.Parameter] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if flags.optim == "adam":
        return torch.optim.Adam(parameters, lr=flags.lr, fused=True)
    if flags.optim == "adamw" and flags.decayed == "matrices":
        return torch.optim.AdamW(parameter_groups(model, flags.weight_decay), lr=flags.lr, fused=True)
    if flags.optim == "adamw":
        return torch.optim.AdamW(parameters, lr=flags.lr, weight_decay=flags.weight_decay, fused=True)
    if flags.optim == "sgd":
        return torch.optim.SGD(parameters, lr=flags.lr, momentum=flags.mom)
    return torch.optim.Adagrad(parameters, lr=flags.lr)


def learning_rate(flags: Flags, step: int, plateau_factor: float = 1.0) -> float:
    """The rate of update number `step`, counted from 0.

    Linear warm-up, then: cosine lr (1 + cos(pi t / max_step)) / 2 down to eta_min, counted from step 0 as in the official code;
    linear from lr at the end of warm-up down to 0; inv_sqrt lr / sqrt(t), also official; constant; dev_perf lr times a factor decided by
    `Plateau`.
    """
    if step < flags.warmup_step:
        end = flags.lr / math.sqrt(flags.warmup_step) if flags.scheduler == "inv_sqrt" else flags.lr
        return end * (step + 1) / flags.warmup_step
    if flags.scheduler == "cosine":
        progress = min(step / flags.max_step, 1.0)
        return flags.eta_min + (flags.lr - flags.eta_min) * (1 + math.cos(math.pi * progress)) / 2
    if flags.scheduler == "linear":
        return flags.lr * max(flags.max_step - step, 0) / max(flags.max_step - flags.warmup_step, 1)
    if flags.scheduler == "inv_sqrt":
        return flags.lr / math.sqrt(max(step, 1))
    if flags.scheduler == "dev_perf":
        return max(flags.lr * plateau_factor, flags.lr_min)
    return flags.lr


class Plateau:
    """dev_perf: the factor falls by `decay_rate` when validation has not improved for more than `patience` validations."""

    def __init__(self, flags: Flags):
        self.decay_rate, self.patience = flags.decay_rate, flags.patience
        self.factor, self.best, self.waited = 1.0, math.inf, 0

    def observe(self, quality: float) -> None:
        if quality < self.best:
            self.best, self.waited = quality, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.factor, self.waited = self.factor * self.decay_rate, 0

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        best = math.inf if state["best"] is None else state["best"]  # no validation yet
        self.factor, self.best, self.waited = state["factor"], best, int(state["waited"])
