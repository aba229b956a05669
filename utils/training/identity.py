"""The identity of a run, as values: its settings that differ from preset and method, and its initial weights. Imports no torch."""

import dataclasses
from typing import Any

from utils.checkpoints.origin import Source
from utils.flags.derive import built_options, finetuning_k, idle, method_flags, resolve, training_flags, usual_flags
from utils.flags.fields import EARLIER, FinetuneFlags, Flags, names
from utils.flags.models import MODELS
from utils.flags.presets import finetuning


def table_of(flags: Flags, source: Source | None) -> str:
    """The table that a run belongs to."""
    if isinstance(flags, FinetuneFlags):
        return "surgery" if source.surgery else "table2"
    if source and MODELS[flags.model].from_folder:
        return "recovery"
    return "surgery" if source else "table1"


def departures_of(flags: Flags, source: Source | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run that differ from its preset, and those that differ from its method, now or in pre-training."""
    of_preset, of_method = departures(flags, _usual(flags, source) if source else usual_flags(flags))
    taught = {name: getattr(flags, name) for name in names(role="taught")} if flags.teacher else {}
    return of_preset, of_method | taught


def _usual(flags: Flags, source: Source) -> Flags:
    """The flags of a run from a checkpoint with nothing given: training by preset, experts by method, model by checkpoint."""
    finetunes = isinstance(flags, FinetuneFlags)
    operated = names(role="surgery") if finetunes or source.surgery else ()
    made = {name: getattr(flags, name) for name in (*names(role="model"), *operated, "method", "moe", "preset")}
    if not finetunes:
        return Flags(**{**training_flags(flags.model, flags.method, flags.preset), **made})
    made |= {name: source.flags.get(name, getattr(flags, name)) for name in ("dropout", "dropatt", "dynamic_moe_mode")}
    values = {**method_flags(flags.method), **made}
    preset = finetuning(flags.task, flags.preset, flags.model)
    return FinetuneFlags(**{**values, **preset, **finetuning_k(values), "task": flags.task, "dataset": flags.task})


def departures(flags: Flags, usual: Flags) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that differ from the preset, and from the method, given the `usual` flags of preset and method."""
    derived, variants = names(role="derived"), names(role="variant")
    left_out = (*names(role="run"), *derived, *idle(flags))
    own = [field.name for field in dataclasses.fields(flags) if field.name not in left_out]
    found = {name: getattr(flags, name) for name in own if getattr(flags, name) != getattr(usual, name)}
    follows = resolve(dataclasses.replace(usual, **found, d_ff=flags.d_ff))
    found |= {name: getattr(flags, name) for name in derived if getattr(flags, name) != getattr(follows, name)}
    if flags.d_ff != usual.d_ff:
        found["d_ff"] = flags.d_ff
    experts = {name: value for name, value in found.items() if name in (*names(group="experts"), "d_inner")}
    found.pop("method_options", None)
    fields = [(field, getattr(built, field.name)) for built in built_options(flags) for field in dataclasses.fields(built)]
    earlier = {field.name: field.metadata["earlier"] for field, _ in fields if "earlier" in field.metadata and flags.defaults == EARLIER}
    options = {field.name: value for field, value in fields if value != earlier.get(field.name, field.default)}
    options |= {"defaults": EARLIER} if earlier else {}
    of_method = (experts if flags.moe else {}) | {name: found[name] for name in found if name in variants} | options
    return {name: value for name, value in found.items() if name not in (*experts, *variants)}, of_method


def own_settings(flags: Flags) -> dict[str, Any]:
    """Where a training departs from its method, without what surgery decided."""
    decided = {*names(role="surgery"), *names(role="start")}
    return {name: value for name, value in departures(flags, usual_flags(flags))[1].items() if name not in decided}


def training_of(source: Source) -> dict[str, Any]:
    """The first training of a checkpoint, before any operation on its weights; only a name for a folder of weights."""
    if "method" in source.trained or "folder" in source.trained:
        of_version_0_1 = "method" in source.trained and "settings" not in source.trained and "preset" in source.flags
        return source.trained | ({"settings": own_settings(source.made)} if of_version_0_1 else {})
    made = source.made
    preset_settings, settings = departures(made, usual_flags(made))
    own = {"preset": made.preset, "preset_settings": preset_settings, "method": made.method or "custom", "settings": settings}
    return source.trained | own | {"seed": made.seed}


def operations_of(source: Source) -> list[dict[str, Any]]:
    """Everything done to the weights of a checkpoint after their first training; the last training with its settings."""
    operations = list(source.operations)
    if operations and operations[-1]["method"] == "train" and "preset" in source.flags and (settings := own_settings(source.made)):
        operations[-1] = {"settings": settings} | operations[-1]
    return operations


def provenance(source: Source, transferred: bool) -> dict[str, Any]:
    """The entry of a checkpoint in a record. transferred: whether its weights are used."""
    measured = {"surgery": source.surgery} if source.surgery else {}
    weights = {"operations": operations_of(source), "sha256": source.fingerprint, "transferred": transferred}
    return training_of(source) | weights | measured
