"""Description of a model in its configuration, from which loading rebuilds exactly its MoE layers.

Before a model is saved, its twin is built from the configuration, without memory for weights. If their parameters have the same names, the
folder can be loaded. If not, because a part of the model or something around it was converted, the part is searched that gives them.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.monkey_patching import apply_patches
from transformers.utils import ContextManagers

from smoe_dropout.control import moe_layers, stored_k
from smoe_dropout.conversion import converted_networks
from smoe_dropout.experts.int8 import Int8Experts
from smoe_dropout.hf.described import Conversion, described, entries_of, entry_of
from smoe_dropout.hf.integration import describe
from smoe_dropout.hf.loading import converting, default_dtype
from smoe_dropout.layer import STATE_OF_K, MoELayer
from smoe_dropout.options import ConfigError

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # put into names by torch.compile, FSDP, checkpointing


def describe_for_saving(model: nn.Module) -> None:
    """Make the configuration of a PreTrainedModel with MoE layers describe them, with the k that is set.

    Raises ConfigError if no configuration does, for instance because the model was changed by hand before its conversion. Warns if that
    cannot be found out, because the class needs more than a configuration. A model without MoE layers, or of which only adapters are saved,
    is left alone.
    """
    groups: dict[tuple[int, int], list[tuple[str, MoELayer]]] = {}
    for name, layer in sorted(moe_layers(model), key=lambda pair: pair[1].conversion):
        groups.setdefault((layer.conversion, id(layer.shared)), []).append((name, layer))
    if not groups or getattr(model, "_hf_peft_config_loaded", False):
        return
    if any(isinstance(layer.experts, Int8Experts) for _, layer in moe_layers(model)):
        raise ConfigError(
            "int8 experts are not saved with a configuration: save the model from which slim made them, and slim it again once it is "
            "loaded, or use smoe_dropout.save_model(model, folder)"
        )
    entries = entries_of(model.config)
    if len(groups) == len(entries):
        ks = (stored_k([layer for _, layer in group]) for group in groups.values())
        entries = [{**entry, **k} for entry, k in zip(entries, ks, strict=True)]
    try:
        fault = difference(model, entries) if entries else "its configuration describes no experts"
        if fault is not None:
            entries = search(model, list(groups.values()))
            fault = difference(model, entries) if entries else fault
    except TypeError as error:
        if not entries:
            raise ConfigError(f"{type(model).__name__} cannot be built from its configuration: {error}") from None
        warnings.warn(f"{type(model).__name__} is saved, but whether it can be loaded is unknown: {error}", stacklevel=3)
        fault = None
    if fault is not None:
        raise ConfigError(
            f"{type(model).__name__} cannot be saved by save_pretrained, because a model built from its configuration has other MoE layers "
            f"({fault}): convert a model as its class builds it, or use smoe_dropout.save_model(model, folder)"
        )
    describe(model, entries)


def search(model: nn.Module, groups: list[list[tuple[str, MoELayer]]]) -> list[dict[str, Any]]:
    """Conversions that give the model's MoE layers, each found by trying; empty if there are none."""
    entries: list[dict[str, Any]] = []
    so_far: list[str] = []
    for group in groups:
        names, layers = [name for name, _ in group], {layer for _, layer in group}
        so_far += names
        config = replace(group[0][1].config, **stored_k([layer for _, layer in group]))
        replaced = [name for name, layer in converted_networks(model).items() if layer in layers]
        for module in containing(names):
            inside = tuple(name.removeprefix(f"{module}.") if module else name for name in replaced)
            for tried in (config, replace(config, layers=None, sites=inside)):
                entry = entry_of(Conversion(module, tried))
                if difference(model, [*entries, entry], so_far) is None:
                    break
            else:
                continue
            break
        else:
            return []
        entries.append(entry)
    return entries


def containing(names: list[str]) -> Iterator[str]:
    """Names of the modules that contain all of these, from the whole model, "", inwards."""
    parts = names[0].split(".")[:-1]
    prefixes = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    return (prefix for prefix in prefixes if all(name.startswith(f"{prefix}." if prefix else "") for name in names))


def difference(model: nn.Module, entries: list[dict[str, Any]], only: list[str] | None = None) -> str | None:
    """Difference of the MoE layers of a model built with these conversions; None if there is none.

    only: names of the model's MoE layers that these conversions made; None: all.
    """
    kind = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    config = described(model.config, entries)
    try:
        with ContextManagers([torch.random.fork_rng(devices=[]), default_dtype(model.dtype), torch.device("meta"), *as_in_loading()]):
            twin = converting(kind)(config)
    except (ConfigError, AttributeError) as error:
        return str(error)
    ours, theirs = parameters(model), parameters(twin)
    if only is not None:
        ours = {name: shape for name, shape in ours.items() if name.startswith(tuple(f"{layer}." for layer in only))}
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"{name} is only in {'this one' if name in ours else 'the other'}"
    wrong = [name for name, shape in ours.items() if shape.numel() and shape != theirs[name]]
    return f"{wrong[0]} has shape {tuple(theirs[wrong[0]])}" if wrong else None


def as_in_loading() -> tuple:
    """Contexts in which transformers builds a model that it loads."""
    return init.no_tie_weights(), init.meta_device_safe_creation_ops(), apply_patches()


def parameters(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the parameters of MoE layers by name, without the names of wrappers; under ZeRO they are empty."""
    found = {}
    for prefix, layer in moe_layers(model):
        for name, parameter in layer.named_parameters(prefix):
            found[unwrapped(name)] = parameter.shape
    return found


def unwrapped(name: str) -> str:
    """Name of a module or tensor without those of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def weights_of(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without the k of its layers, which is in the configuration."""
    ks = {f"{unwrapped(name)}.{STATE_OF_K}" for name, _ in moe_layers(model)}
    return {name: value for name, value in state.items() if unwrapped(name) not in ks}
