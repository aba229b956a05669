"""Adoption of a model's own mixture-of-experts blocks: the configuration that describes them, and their replacement by MoE layers."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.native.blocks import native_blocks
from smoe_dropout.native.layer import AdoptedLayer, Options, adopted
from smoe_dropout.native.recognition import Native, recognise
from smoe_dropout.options import ConfigError, build_options, option_names
from smoe_dropout.routers.scored import ScoredRouter

BALANCE = "router_aux_loss_coef"


def described(model: nn.Module) -> SMoEConfig:
    """Configuration with which `moefy` turns the model's own blocks into MoE layers that compute the same.

    The balance loss has the model's `router_aux_loss_coef`, times k and divided by the number of layers L: transformers' loss adds up the k
    choices and averages over layers, ours averages over choices and adds up layers. Raises ConfigError for a model without such blocks, or
    with one that is not representable.
    """
    found = recognised(model)
    if differing := [name for name, native in found if (native.k, native.options) != (found[0][1].k, found[0][1].options)]:
        raise ConfigError(f"{found[0][0]} and {differing[0]} route differently, which one configuration cannot describe")
    native, counts = found[0][1], tuple(native.parts.num_experts for _, native in found)
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(text, BALANCE, getattr(config, BALANCE, None)) or 0.0
    layers = [model.get_submodule(name) for name, _ in found]
    widths = {_width(block, native) for block, (_, native) in zip(layers, found, strict=True)}
    if len(widths) > 1:
        raise ConfigError(f"its experts have different widths {sorted(widths)}, which a single d_expert cannot describe")
    return SMoEConfig(
        num_experts=max(counts),
        top_k=native.k,
        d_expert=widths.pop(),
        router="scored",
        balance_loss=coefficient * native.k / len(found),
        experts_by_layer=counts if len(set(counts)) > 1 else None,
        options=native.options,
        adopted=str(getattr(text, "model_type", None) or type(layers[0]).__name__),
    )


def adopted_layers(model: nn.Module, config: SMoEConfig) -> list[AdoptedLayer]:
    """Replace the model's own blocks with MoE layers as `config` describes them, in place, one after another, and return them.

    A block keeps its tensors if its sizes are those of the configuration; a configuration that surgery has changed gives fresh ones.
    Raises ConfigError, leaving the model untouched, as in `described`, and for other options or another number of layers.
    """
    known = option_names([ScoredRouter.Options, Options])
    for kind in (ScoredRouter.Options, Options):
        build_options(kind, config.options, known)
    found = recognised(model)
    config.require_layers(len(found))
    layers = []
    for place, (name, native) in enumerate(found):
        block, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        layer = adopted(block, native.parts, native.layout, native.dropout, config.of_layer(place))
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
        del block  # its tensors are free before the next block's are copied
    return layers


def recognised(model: nn.Module) -> list[tuple[str, Native]]:
    """Names of the model's own blocks, and what they are. ConfigError if there are none, or one is not representable."""
    found = []
    for name, block in native_blocks(model):
        kind = _signature(block)
        if kind not in _KNOWN:
            with torch.device("cpu"):  # where trials run, also while a model is built on the meta device
                _KNOWN[kind] = recognise(block)
        native = _KNOWN[kind]
        if not name or isinstance(native, str):
            reason = native if name else "it is the whole model: pass the model that contains it"
            raise ConfigError(f"{name or 'the model'}, a {type(block).__name__}, cannot become an MoE layer: {reason}")
        found.append((name, native))
    if not found:
        raise ConfigError(f"{type(model).__name__} has no mixture-of-experts blocks of its own: use moefy(model, SMoEConfig(...))")
    return found


def _width(block: nn.Module, native: Native) -> int:
    shape = block.get_parameter(native.parts.maps[native.layout.order[-1]][0]).shape[-2:]
    return shape[1] if native.layout.out_transposed else shape[0]


_KNOWN: dict[Any, Native | str] = {}  # by signature, so that a model's blocks are tried once, not once per layer and call


def _signature(block: nn.Module) -> Any:
    """Equal for blocks that compute the same, given their tensors: classes, shapes and settings of their modules."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    configs = {id(config): config for module in block.modules() if hasattr(config := getattr(module, "config", None), "__dict__")}
    modules = tuple((name, type(module), _settings(module)) for name, module in block.named_modules())
    return modules, tuple(map(_settings, configs.values())), tuple((name, tuple(tensor.shape)) for name, tensor in tensors)


def _settings(owner: object) -> tuple:
    return tuple((name, _hashable(value)) for name, value in vars(owner).items() if name not in ("layer_idx", "training"))


def _hashable(value: object) -> Any:
    """A setting as a key: plain values and functions, such as an activation, as they are, and of anything else the class."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, functools.partial):
        return _hashable([value.func, *value.args, *value.keywords.items()])
    if isinstance(value, types.MethodType):
        return value.__func__
    plain = bool | int | float | str | torch.dtype | types.FunctionType | types.BuiltinFunctionType
    return value if isinstance(value, plain) else type(value)
