"""The mean of a model's weights over a range of training steps (Izmailov et al. 2018, arXiv 1803.05407; every step, Cha et al. 2021,
arXiv 2102.08604, SWAD). The official code takes one set of weights at each validation.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Running mean of the trained parameters, in float32 at least, over steps `start` to `end`."""

    def __init__(self, model: nn.Module, start: int, end: int):
        self.start, self.end, self.count = start, end, 0
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.means = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in trained.items()}

    @torch.no_grad()
    def observe(self, model: nn.Module, step: int) -> None:
        """Includes the weights after update number `step`, if it is in the range."""
        if not self.start <= step <= self.end:
            return
        self.count += 1
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.means.values()), [parameters[n].to(m.dtype) for n, m in self.means.items()], 1 / self.count)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Gives the model the mean weights inside the block. ValueError if no step has been included."""
        if self.count == 0:
            raise ValueError(f"no weights have been averaged: the mean begins at step {self.start}")
        parameters = dict(model.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.means}
        _assign(parameters, self.means)
        try:
            yield model
        finally:
            _assign(parameters, own)

    def state(self) -> dict[str, Tensor]:
        return {**self.means, "count": torch.tensor(self.count)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.count = int(tensors["count"])
        for name, mean in self.means.items():
            mean.copy_(tensors[name])


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
