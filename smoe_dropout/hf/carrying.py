"""State of layers that route by earlier positions, carried in the cache that the model's attention uses.

It lies in layers of its own behind those of the cache, so that whatever reorders, repeats, crops or copies the cache does so with it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from smoe_dropout.control import moe_layers
from smoe_dropout.hosts.attention import is_causal
from smoe_dropout.options import ConfigError
from smoe_dropout.shared import Shared

CACHE, OTHER = ("past_key_values", "past_key_value", "layer_past"), ("key_value_states", "encoder_hidden_states")
REMEDY = "pass use_cache=False"


class CarriedLayer(DynamicLayer):
    """Layer of a cache that belongs to an MoE layer. place: its conversion and index."""

    def __init__(self, place: tuple[int, int]):
        super().__init__()
        self.place = place


class Past:
    """Earlier positions of one MoE layer in a pass."""

    def __init__(self, carried: CarriedLayer):
        self.carried = carried

    def extend(self, *parts_BTC: Tensor) -> tuple[Tensor, ...]:
        """Both parts with those of the earlier positions before them [B, P + T, C], which later passes find in the cache."""
        first = self.carried.get_seq_length() == 0
        extended = tuple(part[:, 0] for part in self.carried.update(*(part[:, None] for part in parts_BTC)))
        return parts_BTC if first else extended  # the same, but gradients are summed in the same order as without a cache


class SeesCache:
    """Forward pre-hook of an attention module that finds, in the cache it is given, the past of the MoE layer after it.

    layers: number of attention layers of the model. arguments: positions by name of the module's arguments.
    """

    def __init__(self, shared: Shared, place: tuple[int, int], layers: int, arguments: Mapping[str, int]):
        self.shared, self.place, self.layers, self.arguments = shared, place, layers, arguments

    def begin(self, attention: nn.Module, inputs: tuple, named: dict) -> None:
        """Raise ConfigError for a cache that cannot carry the past or does not have it, and for attention to another sequence."""
        kind = type(attention).__name__
        if self.argument(OTHER, inputs, named) is not None:
            raise ConfigError(
                f"{kind} attends from a decoder to an encoder, and the MoE layer after it would route by later tokens: use another method "
                "or convert the encoder's layers only, by the configuration's `layers`"
            )
        cache = self.argument(CACHE, inputs, named)
        self.shared.pasts[self.place[1]] = None if cache is None else self.past(cache, attention)

    def argument(self, names: tuple[str, ...], inputs: tuple, named: dict) -> Any:
        """The first of these arguments that is given and not None."""
        for name in names:
            place = self.arguments.get(name, len(inputs))
            if (given := named.get(name, inputs[place] if place < len(inputs) else None)) is not None:
                return given
        return None

    def past(self, cache: Any, attention: nn.Module) -> Past:
        """The past of the MoE layer in the cache."""
        cache, place = getattr(cache, "self_attention_cache", cache), getattr(attention, "layer_idx", None)
        grown = getattr(cache, "layer_class_to_replicate", None)
        known = isinstance(cache, Cache) and isinstance(place, int)
        own = cache.layers[place] if known and place < len(cache.layers) else None
        if not known or not (isinstance(own, DynamicLayer) or (own is None and grown is not None)):
            raise ConfigError(f"a {type(cache).__name__} cannot carry what MoE layers after {type(attention).__name__} route by: {REMEDY}")
        carried = next((one for one in cache.layers if isinstance(one, CarriedLayer) and one.place == self.place), None)
        if carried is None:
            carried = CarriedLayer(self.place)
            cache.layers += [grown() for _ in range(self.layers - len(cache.layers)) if grown is not None]
            cache.layers.append(carried)
        read, complete = cache.get_seq_length(place), carried.get_seq_length()
        if read != complete:
            raise ConfigError(f"the cache holds {read} positions, {complete} of them with what MoE layers route by: {REMEDY}")
        if read and not is_causal(attention):
            raise ConfigError(f"{type(attention).__name__} attends to later tokens, and so does the routing, not with a cache: {REMEDY}")
        return Past(carried)


def watch_caches(model: nn.Module) -> None:
    """Let MoE layers that route by earlier positions find them in the cache. Can be repeated."""
    count = 1 + max((layer for module in model.modules() if isinstance(layer := getattr(module, "layer_idx", None), int)), default=-1)
    for _, layer in moe_layers(model):
        attention = layer.attention
        if attention is None or layer.watches_cache:
            continue
        names = [*inspect.signature(type(attention).forward).parameters][1:]
        if not {*CACHE, *OTHER}.isdisjoint(names):
            places = {name: place for place, name in enumerate(names)}
            hook = SeesCache(layer.shared, (layer.conversion, layer.index), count, places)
            attention.register_forward_pre_hook(hook.begin, with_kwargs=True)
            layer.watches_cache = True
