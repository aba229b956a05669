"""Builds the model that the flags describe, dense or with experts, and freezes what is not trained."""

from torch import nn

from smoe_dropout import freeze_routers, moe_layers, moefy
from smoe_dropout.adapters import adapt
from smoe_dropout.attention import ExpertQueryKeyValue, expert_attention
from smoe_dropout.methods.base import Settings
from smoe_dropout.options import ConfigError
from utils.data.tokenizer import Vocabulary
from utils.errors import UserError
from utils.flags.derive import built_options, method_of, parse_layers, smoe_config, top_k_schedule
from utils.flags.fields import Flags
from utils.flags.models import MODELS
from utils.models.registry import architecture

ATTENTION_EXPERTS = 16  # as in the official code


def build_model(flags: Flags, vocabulary: Vocabulary | None = None) -> nn.Module:
    """The dense model with its feed-forward layers converted by the method. `vocabulary`: for a model that reads word pieces.
    UserError for a method that cannot be used with the model.
    """
    model, method = architecture(flags.model).build(flags, vocabulary), method_of(flags)
    try:
        if flags.moe and not MODELS[flags.model].from_folder:
            model = moefy(model, smoe_config(flags, method))
        elif method and method.convert:
            model = method.convert(model, built_options(flags)[0])
    except ConfigError as error:
        raise UserError(f"--method {flags.method} cannot be used with --model {flags.model}: {error}") from None
    if flags.attn_moe:
        model = expert_attention(model, parse_layers(flags.moe_index, flags.n_layer)[0], ATTENTION_EXPERTS, flags.init_std)
    freeze(model, flags)
    return model


def freeze(model: nn.Module, flags: Flags) -> None:
    """Freezes the experts (--freeze_main_network), everything in the layers but the routers (--freeze_main_network_all), or everything but
    the experts and routers, of which adapters may be trained instead of the experts (--train_only).
    """
    if flags.freeze_main_network_all:
        routers = {id(parameter) for _, layer in moe_layers(model) for parameter in layer.routing_parameters()}
        for parameter in architecture(flags.model).blocks(model).parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in routers)
    elif flags.train_only is not None:
        inside = {id(parameter) for _, layer in moe_layers(model) for parameter in layer.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in inside)
    elif flags.freeze_main_network:
        for _, layer in moe_layers(model):
            layer.experts.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, ExpertQueryKeyValue):
                module.requires_grad_(False)
    if flags.dynamic_router_start == 0:
        freeze_routers(model)
    if flags.train_only == "adapters":
        adapt(model, flags.adapter_rank)


def forget_router_gradients(model: nn.Module) -> None:
    """Drops the gradients of routers, so that the optimiser skips them."""
    for _, layer in moe_layers(model):
        for parameter in layer.routing_parameters():
            parameter.grad = None


def training_settings(flags: Flags, train_tokens: int) -> Settings:
    """The settings of the run that are passed to a method's objective."""
    schedule = top_k_schedule(flags)
    ks = (schedule.k_min, schedule.k_max) if schedule else (1, 1)
    return Settings(*ks, built_options(flags)[0], train_tokens)
