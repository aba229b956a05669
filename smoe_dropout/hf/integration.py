"""Transformers models with MoE layers: their loss includes the auxiliary losses, and their configuration describes the experts.

With this, transformers' own Trainer, `generate` and `save_pretrained` work unchanged. Importing this module does not import transformers.
"""

import inspect
from typing import Any

from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import moe_layers
from smoe_dropout.hf.described import Described, described, is_pretrained_model, plain
from smoe_dropout.hf.losses import ASKED, COEFFICIENT, normalises_by_items, return_auxiliary_losses, text_config
from smoe_dropout.hosts.original import with_removed
from smoe_dropout.passes import Argument, watch_padding

MASK = Argument("attention_mask", hides=False)


def integrate(model: nn.Module, config: SMoEConfig) -> None:
    """Set up a PreTrainedModel that `moefy` has converted. Other models only take the padding masks of those inside."""
    for module in model.modules():
        if is_pretrained_model(module):
            two = "decoder_attention_mask" in inspect.signature(module.forward).parameters  # of encoder and decoder, which get their own
            watch_padding(module, list({layer.shared: None for _, layer in moe_layers(module)}), [] if two else [MASK])
    if not is_pretrained_model(model):
        return
    _exchange(model, model.config, described(model.config, config))
    if not normalises_by_items(model):
        model.accepts_loss_kwargs = False
    return_auxiliary_losses(model)


def separate(model: nn.Module) -> None:
    """Undo `integrate` in a model whose MoE layers and hooks are gone."""
    for module in list(model.modules()):
        if isinstance(config := getattr(module, "config", None), Described):
            for name in (ASKED, COEFFICIENT):
                vars(text_config(module)).pop(name, None)
            _exchange(model, config, plain(config))
            vars(module).pop("accepts_loss_kwargs", None)


def _exchange(model: nn.Module, before: Any, after: Any) -> None:
    """Replace a configuration wherever a module refers to it, including those that `unmoefy` puts back."""
    for module in with_removed(model):
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, after)
