"""Attention modules of a model, for methods that route by attention.

An attention module has `is_causal`, whether a position attends only to earlier ones (default: yes). It keeps its probabilities
[B, heads, T, keys] if it has a switch `keep_probabilities`; those of transformers return them, after dropout, with
attn_implementation="eager". With a switch `keep_past` its `past.value` is the cache of a pass that reads with one, whose `carry` keeps what
the layer after it needs of earlier positions; `smoe_dropout.hf` does so in caches of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from smoe_dropout.hosts.site import Site
from smoe_dropout.options import ConfigError

if TYPE_CHECKING:
    from smoe_dropout.layer import MoELayer
    from smoe_dropout.shared import Shared


def attention_before(model: nn.Module, site: Site, probabilities: bool) -> nn.Module:
    """The last attention module before a site. ConfigError if there is none, or if it cannot provide `probabilities` when required."""
    found = None
    for module in model.modules():
        if module is getattr(site.parent, site.name):
            break
        found = module if hasattr(module, "keep_probabilities") or hasattr(module, "is_causal") else found
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no attention module before {site.name!r}, which this method needs")
    if probabilities and not hasattr(found, "keep_probabilities"):
        implementation = getattr(getattr(found, "config", None), "_attn_implementation", None)
        if implementation != "eager":
            raise ConfigError(
                f"{type(found).__name__} before {site.name!r} does not return the attention probabilities that this method needs: it uses "
                f"the implementation {implementation or 'of its own code'!r}; build the model with attn_implementation='eager'"
            )
    return found


def keep_probabilities(attention: nn.Module, shared: Shared, index: int) -> None:
    """Make the module keep the probabilities of every pass, for the MoE layer with this index after it."""
    if hasattr(attention, "keep_probabilities"):
        attention.keep_probabilities = True
    else:
        attention.register_forward_hook(_Returned(shared, index).end)


class _Returned:
    """Forward hook that keeps the probabilities a module returns, apart for every thread."""

    def __init__(self, shared: Shared, index: int):
        self.shared, self.index = shared, index

    def end(self, _attention: nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.shared.probabilities[self.index] = output[1].detach()


def keep_past(attention: nn.Module) -> None:
    """Make the module show the cache it reads with to the MoE layer after it, if it can."""
    if hasattr(attention, "keep_past"):
        attention.keep_past = True


def probabilities_before(layer: MoELayer) -> Tensor:
    """Probabilities [B, heads, T, keys] of the attention module before the layer in this pass. RuntimeError if it has not run."""
    if hasattr(layer.attention, "keep_probabilities"):
        return layer.attention.probabilities
    if layer.index not in layer.shared.probabilities:
        raise RuntimeError(f"{type(layer.attention).__name__} has not run before the MoE layer that routes by its probabilities")
    return layer.shared.probabilities[layer.index]


def with_past(layer: MoELayer, *parts_BTC: Tensor) -> tuple[Tensor, ...]:
    """Values of this pass's positions, preceded by those of the positions in the model's cache [B, P + T, C]; P = 0 without a cache.

    ConfigError if the attention module that is given the cache has not run.
    """
    pasts = layer.shared.pasts
    if layer.watches_cache and layer.shared.uses is not None and layer.index not in pasts:
        raise ConfigError(
            f"{type(layer.attention).__name__} is the last attention module before an MoE layer, but did not run before it: use another "
            "method for this model"
        )
    if getattr(layer.attention, "keep_past", False) and (cache := layer.attention.past.value) is not None:
        return cache.carry(layer.index, *parts_BTC)
    past = pasts.pop(layer.index, None)
    return parts_BTC if past is None else past.extend(*parts_BTC)


def is_causal(attention: nn.Module) -> bool:
    """Return whether a position attends only to itself and earlier ones."""
    return bool(getattr(attention, "is_causal", True))
