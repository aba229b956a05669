"""Groups of parameters for an optimiser with weight decay."""

from typing import Any

from torch import nn

from smoe_dropout.arguments import number
from smoe_dropout.control import moe_layers


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups for an optimiser: with weight decay, and with none.

    Biases, including those of experts, which are stacked to [E, H] and [E, D], the scales of norms, and what determines the routing have
    none: decay of a router makes all experts equally likely, whatever the balance loss does. The order is that of the model. ConfigError
    for a decay that is negative or no finite number.
    """
    weight_decay = number("weight_decay", weight_decay)
    layers = [layer for _, layer in moe_layers(model)]
    spared = {id(parameter) for layer in layers for parameter in layer.routing_parameters()}
    spared |= {id(bias) for layer in layers for bias in (layer.experts.bias_up, layer.experts.bias_down)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter.ndim > 1 and id(parameter) not in spared for parameter in trained]
    return [
        {"params": [parameter for parameter, one in zip(trained, decayed, strict=True) if one is decays], "weight_decay": decay}
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
