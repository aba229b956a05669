"""Transformers models with MoE layers: their loss includes the auxiliary losses, and their configuration describes the experts.

With this, transformers' own Trainer, `generate` and `save_pretrained` work unchanged. Importing this module does not import transformers.
"""

import inspect
import sys
from importlib import import_module
from typing import Any

from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import moe_layers
from smoe_dropout.hf.described import Conversion, Described, described, entries_of, entry_of, is_pretrained_model, plain
from smoe_dropout.hf.losses import ASKED, COEFFICIENT, normalises_by_items, return_auxiliary_losses, text_config
from smoe_dropout.hosts.original import with_removed
from smoe_dropout.options import ConfigError
from smoe_dropout.passes import Argument, watch_padding

MASK = Argument("attention_mask", hides=False)


def integrate(model: nn.Module, config: SMoEConfig) -> None:
    """Set up a PreTrainedModel that `moefy` has converted. Other models only take the padding masks of those inside.

    ConfigError for a model with adapters of peft.
    """
    refuse_adapters(model)
    for module in model.modules():
        if is_pretrained_model(module):
            two = "decoder_attention_mask" in inspect.signature(module.forward).parameters  # of encoder and decoder, which get their own
            watch_padding(module, list({layer.shared: None for _, layer in moe_layers(module)}), [] if two else [MASK])
    if any(layer.attention is not None for _, layer in moe_layers(model)):
        import_module("smoe_dropout.hf.carrying").watch_caches(model)
    if not is_pretrained_model(model):
        return
    describe(model, [*entries_of(model.config), entry_of(Conversion("", config))])
    if not normalises_by_items(model):
        model.accepts_loss_kwargs = False
    return_auxiliary_losses(model)


def refuse_adapters(model: nn.Module) -> None:
    """Raise ConfigError for a model with adapters of peft: it trains experts made afterwards, but does not save them."""
    kinds = tuple(
        getattr(sys.modules[place], name)
        for place, name in (("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.peft_model", "PeftModel"))
        if place in sys.modules
    )
    found = next((name for name, module in model.named_modules() if isinstance(module, kinds)), None)
    if found is not None:
        raise ConfigError(
            f"{type(model).__name__} has an adapter of peft in {found or 'itself'}, whose saving would leave the experts out: convert the "
            "model first and then call get_peft_model, with target_parameters or modules_to_save if experts and routers are to be trained, "
            "or merge the adapter by merge_and_unload"
        )


def describe(model: nn.Module, entries: list[dict[str, Any]]) -> None:
    """Make a PreTrainedModel's configuration describe these conversions, in every part of the model that shares it."""
    _exchange(model, model.config, described(model.config, entries))


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
