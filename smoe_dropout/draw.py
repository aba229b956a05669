"""Random draws that every process of a run makes alike: those of the first process count."""

import torch
import torch.distributed
from torch import Tensor


def shared(drawn: Tensor) -> Tensor:
    """The same values on every process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(drawn, 0)
    return drawn
