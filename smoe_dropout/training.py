"""What modules of a method are told of training, and what they report of it."""

import torch
from torch import Tensor, nn


class FollowsTraining:
    """A module that is told by `set_progress` where training stands; `step` is None until then."""

    step: int | None = None
    total_steps: int | None = None

    @property
    def progress(self) -> float:
        """Share of training done, 0 where nobody said."""
        return 0.0 if self.step is None else min(self.step / self.total_steps, 1.0)


class Reports:
    """A module with numbers worth logging."""

    def metrics(self) -> dict[str, float]:
        """By name."""
        return {}


def set_progress(model: nn.Module, step: int, total_steps: int) -> None:
    """Tells every module whose rate, temperature or competition depends on it that training is at `step` of `total_steps`."""
    for module in model.modules():
        if isinstance(module, FollowsTraining):
            module.step, module.total_steps = step, total_steps


def method_metrics(model: nn.Module) -> dict[str, float]:
    """What the modules of a method report, by "module name.quantity"."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Reports)]
    return {f"{name}.{quantity}": value for name, module in found for quantity, value in module.metrics().items()}


def shared(drawn: Tensor) -> Tensor:
    """The same values on every process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(drawn, 0)
    return drawn
