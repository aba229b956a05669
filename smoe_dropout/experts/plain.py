"""All experts as one dense network, each hidden value multiplied by its expert's gate weight: plain operations, of sizes known beforehand.

For exported programs, which must run without this library, and for torch.func, which cannot transform hand-written gradients. The work is
that of the dense FFN for any k, and all hidden values [N, E * H] are in memory at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.experts.activations import ACTIVATIONS


def run(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, weights) -> Tensor:
    """Weighted sum of the chosen experts' outputs [N, D]."""
    gate_NE = weights.gates(indices_NK, weights_NK)
    with torch.autocast(x_ND.device.type, enabled=False):
        return gated(x_ND, gate_NE, weights)


def gated(x_ND: Tensor, gate_NE: Tensor, weights) -> Tensor:
    """Sum of all experts' outputs [N, D], weighted by gates that may be 0."""
    pre_NP = torch.addmm(weights.bias_up_EH.flatten(), x_ND, weights.up_EHD.flatten(0, 1).t())
    hidden_NEH = ACTIVATIONS[weights.activation].apply(pre_NP.unflatten(1, weights.bias_up_EH.shape))
    hidden_NEH = F.dropout(hidden_NEH, weights.dropout) * gate_NE[..., None]
    return torch.addmm(gate_NE @ weights.bias_down_ED, hidden_NEH.flatten(1), weights.down_EHD.flatten(0, 1))


def needed() -> bool:
    """Return whether the model is being exported or transformed by torch.func."""
    if torch.compiler.is_compiling():  # which also runs inside a stack of interpreters
        return torch.compiler.is_exporting()
    return torch._C._functorch.peek_interpreter_stack() is not None


def vmapped() -> bool:
    """Return whether the model is inside torch.vmap, which hides a dimension of its tensors."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
