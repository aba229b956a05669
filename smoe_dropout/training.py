"""Progress of training for modules that depend on it, metrics reported by modules, and random draws shared by all processes."""

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import integer, require_module


class FollowsTraining:
    """Mixin of modules that depend on the training step. `set_progress` sets `step` and `total_steps`; both are None before."""

    step: int | None = None
    total_steps: int | None = None

    @property
    def progress(self) -> float:
        """Fraction of training completed, 0 to 1; 0 if `set_progress` was never called."""
        return 0.0 if self.step is None else min(self.step / self.total_steps, 1.0)


class Reports:
    """Mixin of modules with values worth logging."""

    def metrics(self) -> dict[str, float]:
        """Values by name."""
        return {}


def set_progress(model: nn.Module, step: int, total_steps: int) -> None:
    """Tell every module whose rate, temperature or competition depends on it that training is at `step` of `total_steps`.

    Raises ConfigError for a negative step, or fewer than one in total.
    """
    require_module(model)
    step, total_steps = integer("step", step, 0, None), integer("total_steps", total_steps, 1, None)
    for module in model.modules():
        if isinstance(module, FollowsTraining):
            module.step, module.total_steps = step, total_steps


def method_metrics(model: nn.Module) -> dict[str, float]:
    """Metrics of all modules that report any, keyed "module name.metric"."""
    require_module(model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Reports)]
    return {f"{name}.{quantity}": value for name, module in found for quantity, value in module.metrics().items()}


def synchronized(drawn: Tensor) -> Tensor:
    """Overwrite `drawn` with the values of process 0, so that all processes of a distributed run use the same draw."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(drawn, 0)
    return drawn
