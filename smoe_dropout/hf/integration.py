"""Transformers models with MoE layers: their loss includes the auxiliary losses, and their configuration describes the experts.

With this, transformers' own Trainer, `generate` and `save_pretrained` work unchanged. Importing this module does not import transformers.
"""

from typing import Any

from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.hf.described import Described, described, is_pretrained_model, plain
from smoe_dropout.hf.losses import add_auxiliary_loss, normalises_by_items
from smoe_dropout.hosts.original import with_removed


def integrate(model: nn.Module, config: SMoEConfig) -> None:
    """Set up a PreTrainedModel that `moefy` has converted; any other model is left alone."""
    if not is_pretrained_model(model):
        return
    _exchange(model, model.config, described(model.config, config))
    if not normalises_by_items(model):
        model.accepts_loss_kwargs = False
    if add_auxiliary_loss not in model._forward_hooks.values():
        model.register_forward_hook(add_auxiliary_loss, with_kwargs=True)


def separate(model: nn.Module) -> None:
    """Undo `integrate` in a model whose MoE layers and hooks are gone."""
    for module in list(model.modules()):
        if isinstance(config := getattr(module, "config", None), Described):
            _exchange(model, config, plain(config))
            vars(module).pop("accepts_loss_kwargs", None)


def _exchange(model: nn.Module, before: Any, after: Any) -> None:
    """Replace a configuration wherever a module refers to it, including those that `unmoefy` puts back."""
    for module in with_removed(model):
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, after)
