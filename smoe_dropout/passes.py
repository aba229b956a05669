"""Forward passes of a converted model: where one begins and ends, and which of its tokens are padding.

A layer may be used several times in one pass, as in a model that shares its layers; its losses and load then cover all uses. Padding counts
in neither. The hooks do nothing in a pass that activation checkpointing repeats.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import shown
from smoe_dropout.checks import require_finite_routers, untrained_router
from smoe_dropout.control import layers_or_raise, moe_layers
from smoe_dropout.experts import plain
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError
from smoe_dropout.recomputation import recomputing
from smoe_dropout.routers import Router
from smoe_dropout.selection import MASKED, block, bound
from smoe_dropout.shared import Shared


class RunningPass:
    """Hooks of a converted model that mark its layers as unused when it begins to run.

    They also check the routers' weights in the first pass and after weights were loaded, warn once of a router that the task does not
    train, and once if the model's linear maps have been quantised since: libraries that do this skip the experts silently. It shows by
    `witness`, the place of a linear map: its parent and its name in it.
    """

    def __init__(self, layers: Sequence[MoELayer], witness: tuple[nn.Module, str] | None):
        self.layers, self.witness = layers, witness
        self.checked = -1  # `Router.loads` when the weights were checked

    def begin(self, model: nn.Module, inputs: tuple, named: dict) -> None:
        """Forward pre-hook."""
        if not recomputing():
            batch = next((given for given in (*inputs, *named.values()) if isinstance(given, Tensor)), None)
            for shared in {layer.shared for layer in self.layers}:
                shared.begin(batch)
        if torch.compiler.is_compiling() or plain.needed():
            return
        if self.checked != Router.loads:
            loads = Router.loads
            require_finite_routers(model)
            self.checked = loads
        if model.training and torch.is_grad_enabled() and (sentence := untrained_router(model, self.layers)):
            warnings.warn(sentence, stacklevel=2)
        if self.witness is not None and is_quantised(self.witness[0]._modules.get(self.witness[1])):
            self.witness = None
            warnings.warn(
                "the linear maps of this model have been quantised, but its experts have not: they are stacked parameters, not nn.Linear, "
                "and keep their size and precision; smoe_dropout.slim(model, k, torch.int8) stores them in 8 bits",
                stacklevel=2,
            )

    def end(self, model: nn.Module, *_: object) -> None:
        """Forward hook, also called if the model fails."""
        if not recomputing():
            for shared in {layer.shared for layer in self.layers}:
                shared.end()


def own_layers(model: nn.Module, layers: Sequence[MoELayer]) -> Sequence[MoELayer]:
    """These layers of the model, or, in a replica made by nn.DataParallel, its own. Replicas share hooks with the original."""
    return [layer for _, layer in moe_layers(model)] if is_replica(model) else layers


def is_replica(module: nn.Module) -> bool:
    """Return whether the module is a replica made by nn.DataParallel."""
    return getattr(module, "_is_replica", False)


def is_quantised(linear: nn.Module | None) -> bool:
    """Return whether a module that was an nn.Linear, or its weight, is now of a library for quantisation."""
    weight = getattr(linear, "weight", None)
    names = f"{type(linear)} {type(weight)}".lower()
    return any(word in names for word in ("quant", "torchao", "bitsandbytes"))


class Argument(NamedTuple):
    """Argument of a module's forward, [B, T], that tells real tokens from padding.

    hides: whether it marks the padding: a boolean mask by True, one that is added to attention scores by -inf.
    """

    name: str
    hides: bool


# of torch's stacks of layers, and of the layers themselves
TORCH = (Argument("src_key_padding_mask", True), Argument("tgt_key_padding_mask", True))
TORCH_KINDS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class PaddingMask:
    """Hooks of a module whose argument tells padding, for the layers inside it while it runs.

    Without effect in the replicas of nn.DataParallel, which run at the same time.

    argument: None for a module without one, whose tokens are all real even inside a module that has a mask. sequence_first: whether tokens
    are [T, B, D] although the mask is [B, T].
    """

    def __init__(self, shared: Sequence[Shared], argument: Argument | None, position: int | None, sequence_first: bool = False):
        self.shared, self.argument, self.position, self.sequence_first = shared, argument, position, sequence_first

    def begin(self, module: nn.Module, inputs: tuple, named: dict) -> None:
        """Forward pre-hook."""
        if is_replica(module):
            return
        given = named.get(self.argument.name) if self.argument else None
        if given is None and self.position is not None and len(inputs) > self.position:
            given = inputs[self.position]
        for one in self.shared:
            if given is None:
                one.masks.append(None)
            elif isinstance(given, Tensor) and given.dim() == 2:
                one.masks.append(self.real(given))
            else:  # about pairs of tokens, made by an outer module from its own mask
                one.masks.append(one.masks[-1] if one.masks else None)

    def real(self, given: Tensor) -> Tensor:
        """The mask of real tokens."""
        hidden = given if given.dtype == torch.bool else given != 0
        real = ~hidden if self.argument.hides else given > 0
        return real.t() if self.sequence_first else real

    def end(self, module: nn.Module, *_: object) -> None:
        """Forward hook, also called if the module fails."""
        for one in self.shared:
            if one.masks and not is_replica(module):
                one.masks.pop()


def watch_pass(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Let the model's MoE layers know when a pass begins, and those in torch's Transformer layers which tokens are padding."""
    remove_hooks(model, RunningPass)
    linears = ((parent, name) for parent in model.modules() for name, child in parent.named_children() if type(child) is nn.Linear)
    running = RunningPass(layers, next(linears, None))
    model.register_forward_pre_hook(running.begin, with_kwargs=True)
    model.register_forward_hook(running.end, always_call=True)
    for module in model.modules():
        if isinstance(module, TORCH_KINDS) and any(layer in layers for _, layer in moe_layers(module)):
            attention = next((part for part in module.modules() if isinstance(part, nn.MultiheadAttention)), None)
            sequence_first = not getattr(attention, "batch_first", True)
            watch_padding(module, [layers[-1].shared], TORCH, sequence_first)
            for _, layer in moe_layers(module):
                layer.sequence_first = sequence_first


def remove_hooks(module: nn.Module, kinds: type | tuple[type, ...]) -> None:
    """Remove the forward hooks that are methods of these classes."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    for key in [key for table in tables for key, hook in table.items() if isinstance(getattr(hook, "__self__", None), kinds)]:
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            for table in (name, f"{name}_with_kwargs", f"{name}_always_called"):
                getattr(module, table, {}).pop(key, None)


def watch_padding(module: nn.Module, shared: Sequence[Shared], arguments: Sequence[Argument], sequence_first: bool = False) -> None:
    """Take the padding of the layers inside the module from the first of these arguments that its forward has. Can be repeated."""
    masks = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    watched = [one for mask in masks if isinstance(mask, PaddingMask) for one in mask.shared]
    if not (shared := [one for one in shared if one not in watched]):
        return
    positions = {name: place for place, name in enumerate(inspect.signature(type(module).forward).parameters)}
    argument = next((one for one in arguments if one.name in positions), None)
    mask = PaddingMask(shared, argument, None if argument is None else positions[argument.name] - 1, sequence_first)
    module.register_forward_pre_hook(mask.begin, with_kwargs=True)
    module.register_forward_hook(mask.end, always_call=True)


@block
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[nn.Module]:
    """Context manager for passes with padding: only tokens where `mask` is nonzero count in balance losses and expert load.

    mask: [B, T], shaped as the tokens that the MoE layers see; layers with tokens of another shape ignore it. Models of transformers and
    torch's Transformer layers need it only where their own masks do not say. It takes precedence over these. What the model computes does
    not change. Holds in the calling thread or task, as `top_k`. ConfigError if the model has no MoE layers, or for something that is not
    such a tensor.
    """
    layers = layers_or_raise(model)
    if not isinstance(mask, Tensor) or mask.dim() == 0 or mask.is_complex():
        raise ConfigError(f"mask = {shown(mask)} must be a tensor [B, T] that is nonzero at the tokens that count")
    with bound(MASKED, {layer: mask > 0 for _, layer in layers}):
        yield model
