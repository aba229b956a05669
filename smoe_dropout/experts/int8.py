"""Experts whose maps are stored in 8 bits, for inference: about a quarter of float32's bytes to keep and to read.

Rounding is symmetric with a scale for each input of a map, w = scale * q with q in -127 .. 127, so that nothing has to be calibrated.
Activations and sums keep their precision. With a scale for each input a map times a vector is an embedding bag of scaled rows, which torch
computes on a CPU for all chosen experts at once. Its product with a scale for each output took twice the time, and rounds activations to
bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.experts import Experts, plain
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.few import chosen, rows_of
from smoe_dropout.options import ConfigError
from smoe_dropout.precision import without_autocast

OFTEN = 8  # times that an expert is chosen on average up to which its map is read in 8 bits each time, rather than converted first
LARGEST = 127


class Int8Experts(Experts):
    """Experts made from others by rounding their maps to 8 bits; `up` and `down` are the rounded maps in the precision of the biases.

    up_int8 [E, D, P + 8] and down_int8 [E, H, D + 8], uint8, P hidden values before the activation: each row has q + 127 of one input, then
    its scale and -127 * scale in float32, as torch packs rows. A pass that needs gradients raises ConfigError.
    """

    def __init__(self, experts: Experts):
        nn.Module.__init__(self)
        self.activation, self.dropout, self.backend = experts.activation, experts.dropout, experts.backend
        maps = {"up": experts.up.transpose(1, 2), "down": experts.down}
        for name, rows in maps.items():
            self.register_parameter(f"{name}_int8", nn.Parameter(packed(rows.detach()), requires_grad=False))
            bias = getattr(experts, f"bias_{name}").detach().clone()
            self.register_parameter(f"bias_{name}", nn.Parameter(bias, requires_grad=False))
        self.train(experts.training)

    @property
    def up(self) -> Tensor:
        """The rounded map, shaped as in `Experts`."""
        return unpacked(self.up_int8, self.bias_up.dtype).transpose(1, 2).contiguous()

    @property
    def down(self) -> Tensor:
        """The rounded map, shaped as in `Experts`."""
        return unpacked(self.down_int8, self.bias_down.dtype)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, ragged: bool = False) -> Tensor:
        """Weighted sum of the chosen experts' outputs [N, D], as in `Experts`."""
        if torch.is_grad_enabled() and (self.training or x_ND.requires_grad):
            raise ConfigError(
                "int8 experts are for inference and have no gradients: use torch.no_grad(), or the model from which they were made"
            )
        often = indices_NK.numel() > OFTEN * len(self.bias_up) or indices_NK.numel() == 0
        if often or x_ND.device.type != "cpu" or torch.compiler.is_compiling() or plain.needed():
            return super().forward(x_ND, indices_NK, weights_NK, ragged)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_ND.dtype
        with without_autocast("cpu"), torch.no_grad():
            return self._summed(x_ND.float(), indices_NK, weights_NK.float(), ragged).to(dtype)

    def _summed(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, ragged: bool) -> Tensor:
        (N, D), (E, H) = x_ND.shape, self.down_int8.shape[:2]
        experts_P, weights_P, begin_N, counts_N = chosen(indices_NK, weights_NK, ragged)
        x_PD = x_ND.expand(len(experts_P), D) if N == 1 else x_ND.repeat_interleave(counts_N, 0)
        begin_P = torch.arange(0, len(experts_P) * D, D)
        pre_PH = bag(self.up_int8, rows_of(experts_P, D, E), begin_P, x_PD.reshape(-1)) + self.bias_up.float()[experts_P]
        hidden_PH = ACTIVATIONS[self.activation].apply(pre_PH) * weights_P[:, None]
        y_ND = bag(self.down_int8, rows_of(experts_P, H, E), begin_N * H, hidden_PH.flatten())
        return y_ND + F.embedding_bag(experts_P, self.bias_down.float(), begin_N, mode="sum", per_sample_weights=weights_P)

    def extra_repr(self) -> str:
        """Sizes and settings, for `print(model)`."""
        E, H, _ = self.down_int8.shape
        return f"num_experts={E}, d_model={self.up_int8.shape[1]}, d_expert={H}, activation={self.activation}, int8"


def packed(rows: Tensor) -> Tensor:
    """Rows [..., W] rounded to 8 bits, with their scale and offset: uint8 [..., W + 8]."""
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    q = (rows / scale).round_().add_(LARGEST).to(torch.uint8)
    return torch.cat([q, torch.cat([scale, -LARGEST * scale], -1).view(torch.uint8)], -1)


def unpacked(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounded rows [..., W]."""
    scale = rows[..., -8:].contiguous().view(torch.float32)[..., :1]
    return ((rows[..., :-8].float() - LARGEST) * scale).to(dtype)


def bag(rows_ERW: Tensor, indices_M: Tensor, begin: Tensor, weights_M: Tensor) -> Tensor:
    """Weighted sums of rows, one sum from each of the places where one begins."""
    rows = rows_ERW.flatten(0, 1)
    return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(rows, indices_M, begin, False, 0, False, weights_M)
