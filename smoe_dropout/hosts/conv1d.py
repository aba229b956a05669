"""GPT-2 and similar models of transformers: `c_fc`, `act`, `c_proj`, `dropout`, with Conv1D maps whose weights are [in, out]."""

from torch import nn

from smoe_dropout.experts.activations import activation_name
from smoe_dropout.hosts.site import Site


def find(model: nn.Module) -> list[Site]:
    """Sites in the order of the model's layers."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    return [site for place in found if (site := _site(*place))]


def _site(parent: nn.Module, name: str, mlp: nn.Module) -> Site | None:
    up, down, activation = (getattr(mlp, part, None) for part in ("c_fc", "c_proj", "act"))
    if {type(up).__name__, type(down).__name__} != {"Conv1D"} or up.nx != down.nf or (kind := activation_name(activation)) is None:
        return None

    def put_dropout(module: nn.Module) -> nn.Module:
        mlp.act = nn.Sequential(activation, module).train(parent.training)
        return down

    tensors = up.weight.t(), up.bias, down.weight.t(), down.bias
    return Site(parent, name, *tensors, kind, 0.0, getattr(mlp, "dropout", None), put_dropout)
