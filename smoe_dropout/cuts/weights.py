"""Balanced clusters of the neurons' rows in the first map (MoEfication, arXiv 2110.01786, section 3.2, "parameter clustering split")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.cuts import Neurons, balanced_clusters

NEEDS_DATA = False


def order(neurons: Neurons, num_experts: int, draw: torch.Generator) -> Tensor:
    """A permutation [F] with the neurons of a cluster side by side; rows are compared by their direction."""
    return balanced_clusters(F.normalize(neurons.rows_FD.float(), dim=1), num_experts, draw).argsort(stable=True)
