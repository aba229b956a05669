"""The way back from MoE layers to dense feed-forward networks, where those compute the same."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from smoe_dropout.control import moe_layers
from smoe_dropout.experts import Experts
from smoe_dropout.hosts.original import TENSORS, fill, put_modules, replaced_since, undo
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import INTEGRATIONS, load


def unmoefy(model: nn.Module) -> nn.Module:
    """Replace all MoE layers of `model` with the feed-forward networks that `moefy` replaced, in place, and return the model.

    The networks have the weights that the experts have now, in their precision and on their device, and compute the same as the layers:
    experts that are all active with equal weights form one network, with the output scale in its down map, and experts that are still
    copies of one network are that network. A transformers model is then an ordinary one for its own save_pretrained. Build the optimiser
    afterwards.

    Raises ConfigError, leaving the model untouched, if a layer computes what no network of the original's shape does: some of its experts
    only, weights that depend on the token, a method's own layer, compressed experts, or biases where the original has none.
    """
    layers, modules = moe_layers(model), dict(model.named_modules())
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no MoE layers: it is dense already")
    held = {part for module in modules.values() for put in put_modules(module) for part in put.modules()}
    for name, layer in layers:
        if sentence := _refusal(layer) or (None if layer in held else "it was put into a module that is not part of this model"):
            raise ConfigError(f"layer {name!r} cannot become dense again: {sentence}")
    for name, module in modules.items():
        if child := replaced_since(module):
            raise ConfigError(f"{name}.{child} was replaced after moefy, so what was before it cannot be put back")
    for _, layer in layers:
        trained = {each: getattr(layer.experts, each.replace("gate", "up")).requires_grad for each in TENSORS}
        fill(layer.original, dense_maps(layer), trained)
    for module in modules.values():
        undo(module)
    for library in INTEGRATIONS:
        if library in sys.modules:
            load(INTEGRATIONS, "integration", library).separate(model)
    return model


@torch.no_grad()
def dense_maps(layer: MoELayer) -> dict[str, Tensor]:
    """Maps of the dense network that computes the same as the layer, named and shaped as in `hosts.site.Site`."""
    experts, copies = layer.experts, _are_copies(layer.experts, layer.original["up"].size[0])
    E, H, _ = experts.down.shape
    kept = 1 if copies else E
    scale = layer.output_scale if copies or not layer.router.uniform else layer.output_scale / E
    ups, biases = (stacked[:kept].unflatten(1, (-1, H)).transpose(0, 1).flatten(1, 2) for stacked in (experts.up, experts.bias_up))
    bias_down = experts.bias_down[0] * kept if _equal(experts.bias_down) else experts.bias_down[:kept].sum(0)
    maps = {"up": ups[-1], "bias_up": biases[-1], "down": experts.down[:kept].flatten(0, 1).t(), "bias_down": bias_down}
    if len(ups) == 2:  # the gate's rows come first
        maps |= {"gate": ups[0], "bias_gate": biases[0]}
    return maps if scale == 1 else maps | {name: maps[name] * scale for name in ("down", "bias_down")}


def _refusal(layer: MoELayer) -> str | None:
    """Sentence why the layer does not compute what a dense network does, or None."""
    experts, router, config = layer.experts, layer.router, layer.config
    if config.adopted is not None:
        return "it was a mixture of experts before it was adopted, and adoption is not taken back"
    if any(getattr(type(layer), name) is not getattr(MoELayer, name) for name in ("forward", "run", "route", "combine", "scaled")):
        return f"method = {config.method!r} routes or combines experts as no dense network does"
    if config.expert_rank is not None:
        return f"its experts are compressed (expert_rank = {config.expert_rank})"
    if type(experts) is not Experts:
        return f"its experts were wrapped, as {type(experts).__name__}: unwrap them first"
    if layer.original is None:
        return "where the weights of the network before it were is not known"
    (E, H, _), width = experts.down.shape, layer.original["up"].size[0]
    if not (_are_copies(experts, width) and (router.uniform or ("gate_weight" in router.uses and router.normalised))):
        if not (router.equal or (E == 1 and router.normalised)):
            return f"the weights of its experts depend on the token (router {config.router!r}, gate_weight = {config.gate_weight!r})"
        if layer.top_k != E:
            return f"{layer.top_k} of its {E} experts are active, and only all form a dense network: call set_top_k(model, {E}) first"
        if width != E * H:
            return f"its {E} experts have {E} x {H} = {E * H} hidden units, and the network before it had {width}"
    absent = {name.replace("gate", "up") for name in _biases(layer) if name not in layer.original}
    if any(bias.any() for name in absent if not (bias := getattr(experts, name)).is_meta):
        return "its experts have biases, and the network before it had none: train with the biases of the experts frozen"
    return None


def _biases(layer: MoELayer) -> tuple[str, ...]:
    return ("bias_up", "bias_down", *(["bias_gate"] if "gate" in layer.original else []))


def _are_copies(experts: Experts, width: int) -> bool:
    """Return whether all experts are the same network of this width."""
    return experts.down.shape[1] == width and all(map(_equal, experts.parameters()))


def _equal(stacked: Tensor) -> bool:
    return not stacked.is_meta and bool((stacked == stacked[:1]).all())
