"""Transformers models with MoE layers: their loss includes the auxiliary losses, and their configuration describes the experts.

With this, transformers' own Trainer, `generate` and `save_pretrained` work unchanged. Importing this module does not import transformers.
"""

from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.hf.described import described, is_pretrained_model
from smoe_dropout.hf.losses import add_auxiliary_loss, normalises_by_items


def integrate(model: nn.Module, config: SMoEConfig) -> None:
    """Set up a PreTrainedModel that `moefy` has converted; any other model is left alone."""
    if not is_pretrained_model(model):
        return
    before, after = model.config, described(model.config, config)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, after)
    if not normalises_by_items(model):
        model.accepts_loss_kwargs = False
    model.register_forward_hook(add_auxiliary_loss, with_kwargs=True)
