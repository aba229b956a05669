"""torch's nn.TransformerEncoderLayer and nn.TransformerDecoderLayer: linear2(dropout(activation(linear1 x))), children of the layer.

The experts replace `linear1`, and the other three become identities. The fused kernel that computes a whole encoder layer in evaluation
reads the weights of the dense maps, so it is disabled.
"""

from torch import nn

from smoe_dropout.hosts.blocks import unchanged
from smoe_dropout.hosts.maps import linear_map
from smoe_dropout.hosts.probe import activation_of
from smoe_dropout.hosts.site import Site

_KINDS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def find(model: nn.Module) -> list[Site]:
    """Sites in the order of the model's layers."""
    stacks = {layer: stack for stack in model.modules() if isinstance(stack, nn.TransformerEncoder) for layer in stack.layers}
    return [site for layer in model.modules() if isinstance(layer, _KINDS) and (site := _site(layer, stacks.get(layer)))]


def _site(layer: nn.Module, stack: nn.TransformerEncoder | None) -> Site | None:
    if not any(type(layer)._ff_block is kind._ff_block for kind in _KINDS):
        return None
    up, down, dropout, activation = layer.linear1, layer.linear2, layer.dropout, layer.activation
    name = activation_of(activation)
    if name is None or linear_map(up) is None or linear_map(down) is None or not isinstance(dropout, nn.Dropout):
        return None

    def put(module: nn.Module) -> None:
        layer.linear1 = module.train(layer.training)
        for rest in ("dropout", "linear2"):
            setattr(layer, rest, nn.Identity().train(layer.training))
        del layer.activation
        layer.activation = unchanged  # a function, since copying a decoder layer puts ReLU in place of a module
        _leave_fused_path(layer, stack)

    def put_dropout(module: nn.Module) -> nn.Module:
        layer.dropout = module.train(layer.training)
        _leave_fused_path(layer, stack)
        return down

    tensors = up.weight, up.bias, down.weight, down.bias
    return Site(layer, "linear1", *tensors, name, dropout.p, put_dropout=put_dropout, put=put)


def _leave_fused_path(layer: nn.Module, stack: nn.TransformerEncoder | None) -> None:
    layer.activation_relu_or_gelu = 0
    if stack is not None:
        stack.use_nested_tensor = False  # nested tensors work with the fused layers only
