"""Models whose feed-forward networks are nn.Sequential(Linear, activation, [Dropout], Linear, [Dropout]).

These are this repository's Transformer-XL and most hand-written Transformers. A final Dropout is kept, after the experts.
"""

from torch import nn

from smoe_dropout.experts.activations import activation_name
from smoe_dropout.hosts.site import Site, is_linear


def find(model: nn.Module) -> list[Site]:
    """Sites in the order of the model's modules."""
    sites = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Sequential) and (site := _site(parent, name, child)):
                sites.append(site)
    return sites


def _site(parent: nn.Module, name: str, ffn: nn.Sequential) -> Site | None:
    kinds = [module for module in ffn if not isinstance(module, nn.Dropout)]
    dropouts = {position: module for position, module in enumerate(ffn) if isinstance(module, nn.Dropout)}
    if len(kinds) != 3 or not is_linear(kinds[0]) or not is_linear(kinds[2]):
        return None
    up, activation, down = kinds
    if (name_of_activation := activation_name(activation)) is None or up.in_features != down.out_features:
        return None
    if set(dropouts) - {2, len(ffn) - 1} or (2 in dropouts and ffn[3] is not down):
        return None
    inner = dropouts[2].p if 2 in dropouts else 0.0
    final = None if ffn[-1] is down else ffn[-1]

    def put_dropout(module: nn.Module) -> nn.Module:
        whole = nn.Sequential(up, activation, module, down, *([] if final is None else [final]))
        setattr(parent, name, whole.train(parent.training))
        return down

    tensors = up.weight, up.bias, down.weight, down.bias
    return Site(parent, name, *tensors, name_of_activation, inner, final, put_dropout)
