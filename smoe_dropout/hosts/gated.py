"""Llama, Mistral, Qwen and similar models of transformers: `gate_proj`, `up_proj`, `down_proj`, `act_fn`; down(act(gate x) * up x)."""

from torch import nn

from smoe_dropout.experts.activations import activation_name
from smoe_dropout.hosts.site import Site, is_linear


def find(model: nn.Module) -> list[Site]:
    """Sites in the order of the model's layers."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    return [site for place in found if (site := _site(*place))]


def _site(parent: nn.Module, name: str, mlp: nn.Module) -> Site | None:
    gate, up, down = (getattr(mlp, f"{part}_proj", None) for part in ("gate", "up", "down"))
    if not all(map(is_linear, (gate, up, down))) or up.in_features != down.out_features:
        return None
    activation = getattr(mlp, "act_fn", None)
    if not isinstance(activation, nn.Module) or (kind := activation_name(activation)) is None:
        return None

    def put_dropout(module: nn.Module) -> nn.Module:
        mlp.down_proj = nn.Sequential(module, down).train(parent.training)
        return down

    tensors = up.weight, up.bias, down.weight, down.bias
    return Site(parent, name, *tensors, f"{kind}_gated", 0.0, None, put_dropout, gate.weight, gate.bias)
