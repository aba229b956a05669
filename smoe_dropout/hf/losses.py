"""Auxiliary losses in the loss that a transformers model returns."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout.control import moe_layers
from smoe_dropout.layer import MoELayer
from smoe_dropout.passes import own_layers, remove_hooks

ASKED, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"


def normalises_by_items(model: nn.Module) -> bool:
    """Return whether the model's loss is a sum divided by `num_items_in_batch`.

    True for the `loss_function` of language models, false for that of classifiers and for losses computed in `forward`. The Trainer assumes
    it for every model whose forward takes **kwargs, and would then accumulate a sum of means.
    """
    names = inspect.unwrap(type(model).forward).__code__.co_names
    return "loss_function" in names and _loss(model) is not None and getattr(model, "accepts_loss_kwargs", True)


def _loss(model: nn.Module) -> Any:
    """The loss function if it is a language model's, else None."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or type(model).__name__, None)
    if loss is None and getattr(model, "loss_type", None) is None:
        loss = ForCausalLMLoss  # transformers' default
    return loss if loss in (ForCausalLMLoss, ForMaskedLMLoss) else None


class Outputs:
    """Hooks of a converted model that add the auxiliary losses to what it returns; see `return_auxiliary_losses`."""

    def __init__(self, layers: list[MoELayer]):
        self.layers = layers

    def begin(self, model: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook. What is asked for is taken out of the arguments, since a converted model's own code knows no routers."""
        asked, by_default = named.get(ASKED), getattr(text_config(model), ASKED, False)
        for layer in own_layers(model, self.layers):
            if by_default if asked is None else asked:
                layer.shared.shown[layer.router] = []
        named = {name: value for name, value in named.items() if name != ASKED}
        # code that reads the configuration itself is told that this is done
        return arguments, {**named, ASKED: False} if by_default and _takes(model, ASKED) else named

    def end(self, model: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> Any:
        """Forward hook, also called, without an output, if the model fails.

        With `num_items_in_batch` the model's loss is its part of a mean over several micro-batches, whose losses are summed; the auxiliary
        losses are then weighted by this micro-batch's fraction of the items.
        """
        layers, own = own_layers(model, self.layers), coefficient(self.layers)
        if output is None:
            for layer in layers:
                layer.shared.shown.clear()
            return None
        losses = [loss for layer in layers for loss in layer.losses.values()] if model.training else []
        total = sum(losses[1:], losses[0]) if losses else None
        if losses:
            now = getattr(text_config(model), COEFFICIENT, own) if own else own
            output = self.with_loss(model, arguments, named, output, total if now == own else total * (now / own))
        if layers[0].router.shown is None:
            return output
        logits = tuple(shown for layer in layers for shown in layer.router.shown)
        for layer in layers:
            layer.shared.shown.clear()
        unweighted = torch.zeros((), device=model.device) if total is None else total / (own or 1.0)
        if isinstance(output, tuple):
            return (*output, unweighted, logits)
        if isinstance(output, dict):
            output["aux_loss"], output["router_logits"] = unweighted, logits
        return output

    @staticmethod
    def with_loss(model: nn.Module, arguments: tuple, named: dict[str, Any], output: Any, auxiliary: Tensor) -> Any:
        """The output with the auxiliary losses in its loss, if it has one."""
        labels = named.get("labels")
        if labels is None and arguments:
            labels = inspect.signature(model.forward).bind_partial(*arguments).arguments.get("labels")
        whole = isinstance(output, dict)
        loss = output.get("loss") if whole else output[0] if labels is not None and isinstance(output, tuple) else None
        if loss is None:
            return output
        items = named.get("num_items_in_batch") if getattr(model, "accepts_loss_kwargs", True) else None
        if items is not None:
            auxiliary = auxiliary * (counted_items(model, labels, named.get("shift_labels")) / items)
        if not whole:
            return (loss + auxiliary, *output[1:])
        output["loss"] = loss + auxiliary
        return output


def return_auxiliary_losses(model: nn.Module) -> None:
    """Let a converted PreTrainedModel return its auxiliary losses, as Mixtral does.

    In training mode `loss` includes them. Asked for by the argument or setting `output_router_logits`, the output has `aux_loss`, their sum
    over layers before the coefficient `config.router_aux_loss_coef`, and `router_logits`, [N, E] for each use of a layer with a linear
    router; a tuple has both at its end. The coefficient is that of the configuration of the experts; changing it changes the loss. In
    evaluation mode there are no auxiliary losses, and `aux_loss` is 0.
    """
    layers, settings = [layer for _, layer in moe_layers(model)], text_config(model)
    remove_hooks(model, Outputs)  # of an earlier conversion
    hooks = Outputs(layers)
    model.register_forward_pre_hook(hooks.begin, with_kwargs=True)
    model.register_forward_hook(hooks.end, with_kwargs=True, always_call=True)
    setattr(settings, COEFFICIENT, coefficient(layers))
    if not hasattr(settings, ASKED):
        setattr(settings, ASKED, False)


def coefficient(layers: list[MoELayer]) -> float:
    """The coefficient of the layers' balance losses; 1 if they have losses of another kind only, 0 if they have none."""
    balances = [getattr(layer.router, "balance_loss", None) for layer in layers]
    if any(balances):
        return max(balance for balance in balances if balance)
    return 1.0 if None in balances or any(layer.own_losses for layer in layers) else 0.0


def text_config(model: nn.Module) -> Any:
    """The part of the configuration where transformers and trainers look for the settings of a language model's routers."""
    try:
        return model.config.get_text_config()
    except ValueError:  # a model with several
        return model.config


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def counted_items(model: nn.Module, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | int:
    """Number of labels in the loss, counted as the Trainer does: from the second position on for causal models."""
    if shift_labels is not None:
        return (shift_labels != -100).sum()
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifted = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not model.config.is_encoder_decoder
    return ((labels[..., 1:] if shifted else labels) != -100).sum()
