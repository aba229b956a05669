"""torch's nn.TransformerEncoderLayer and nn.TransformerDecoderLayer: linear2(dropout(activation(linear1 x))), children of the layer.

The experts replace `linear1`, and the other three become identities. The fused kernel that computes a whole encoder layer in evaluation
reads the weights of the dense maps, so it is disabled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.experts.activations import activation_name
from smoe_dropout.hosts.site import Site, is_linear

_KINDS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


def find(model: nn.Module) -> list[Site]:
    """Sites in the order of the model's layers."""
    stacks = {layer: stack for stack in model.modules() if isinstance(stack, nn.TransformerEncoder) for layer in stack.layers}
    return [site for layer in model.modules() if isinstance(layer, _KINDS) and (site := _site(layer, stacks.get(layer)))]


def _site(layer: nn.Module, stack: nn.TransformerEncoder | None) -> Site | None:
    if not any(type(layer)._ff_block is kind._ff_block for kind in _KINDS):
        return None
    up, down, dropout, activation = layer.linear1, layer.linear2, layer.dropout, layer.activation
    name = activation_name(activation) if isinstance(activation, nn.Module) else _FUNCTIONS.get(activation)
    if name is None or not is_linear(up) or not is_linear(down) or not isinstance(dropout, nn.Dropout):
        return None

    def put(module: nn.Module) -> None:
        layer.linear1 = module.train(layer.training)
        for rest in ("dropout", "linear2"):
            setattr(layer, rest, nn.Identity().train(layer.training))
        del layer.activation
        layer.activation = _identity  # a function, since copying a decoder layer puts ReLU in place of a module
        _leave_fused_path(layer, stack)

    def put_dropout(module: nn.Module) -> nn.Module:
        layer.dropout = module.train(layer.training)
        _leave_fused_path(layer, stack)
        return down

    tensors = up.weight, up.bias, down.weight, down.bias
    return Site(layer, "linear1", *tensors, name, dropout.p, put_dropout=put_dropout, put=put)


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _leave_fused_path(layer: nn.Module, stack: nn.TransformerEncoder | None) -> None:
    layer.activation_relu_or_gelu = 0
    if stack is not None:
        stack.use_nested_tensor = False  # nested tensors work with the fused layers only
