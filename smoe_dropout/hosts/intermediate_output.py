"""BERT, RoBERTa and similar models of transformers, whose feed-forward network is split over two modules.

These are `intermediate` (dense, activation) and `output` (dense, dropout, LayerNorm of the residual sum). The experts replace the first,
and the second keeps everything except its dense map.
"""

from torch import nn

from smoe_dropout.experts.activations import activation_name
from smoe_dropout.hosts.site import Site, is_linear


def find(model: nn.Module) -> list[Site]:
    """Sites in the order of the model's layers."""
    return [site for layer in model.modules() if (site := _site(layer))]


def _site(layer: nn.Module) -> Site | None:
    first, second = getattr(layer, "intermediate", None), getattr(layer, "output", None)
    up, down = getattr(first, "dense", None), getattr(second, "dense", None)
    if not is_linear(up) or not is_linear(down) or up.in_features != down.out_features:
        return None
    activation = getattr(first, "intermediate_act_fn", None)
    if not isinstance(activation, nn.Module) or (name := activation_name(activation)) is None:
        return None

    def put(module: nn.Module) -> None:
        layer.intermediate, second.dense = module.train(layer.training), nn.Identity()

    def put_dropout(module: nn.Module) -> nn.Module:
        first.intermediate_act_fn = nn.Sequential(activation, module).train(layer.training)
        return down

    return Site(layer, "intermediate", up.weight, up.bias, down.weight, down.bias, name, 0.0, put_dropout=put_dropout, put=put)
