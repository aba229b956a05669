"""The neurons in random order (LLaMA-MoE, arXiv 2406.16554, section 3.1, "independent random")."""

import torch
from torch import Tensor

from smoe_dropout.cuts import Neurons

NEEDS_DATA = False


def order(neurons: Neurons, num_experts: int, draw: torch.Generator) -> Tensor:
    """A random permutation [F]."""
    return torch.randperm(len(neurons.rows_FD), generator=draw).to(neurons.rows_FD.device)
